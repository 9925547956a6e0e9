"""The report of a run: one self-contained HTML page with its curves, datasets, times, events and settings."""

import html
import math
from collections.abc import Sequence

from megatron_vlm.platform.charts import Line, draw_lines, to_svg
from megatron_vlm.training.report_events import event_marks, events_card
from megatron_vlm.training.report_page import LATEST, card, count, duration, mean, number, ratio, render_page, table
from megatron_vlm.training.report_time import phases_card, time_card
from megatron_vlm.training.run_records import RunRecords

_LOSS, _VALIDATION = "loss", "validation_loss"
"""Keys of the mean over all datasets; the loss of a dataset is under the key, "/" and its name."""


def render_report(run: RunRecords) -> str:
    """Return the page.

    Args:
        run: from `read_run`; without a finished iteration, the page has no curves.
    """
    sections = [
        _header(run),
        _tiles(run),
        *_charts(run),
        _datasets(run),
        time_card(run),
        phases_card(run),
        events_card(run),
        _work(run),
        _configuration(run),
    ]
    return render_page(f"{_stage(run)} {run.run_dir}".strip(), sections)


def _stage(run: RunRecords) -> str:
    stage = run.metrics[-1].get("stage") if run.metrics else run.config.get("stage")
    return str(stage or "")


def _header(run: RunRecords) -> str:
    if run.end is None:
        text, kind = "running, or killed before it could record its end", "open"
    elif run.end.exit_code == 0:
        text, kind = "finished", "good"
    else:
        text, kind = f"exit code {run.end.exit_code}", "bad"
    message = f'<p class="message">{html.escape(run.end.message)}</p>' if run.end and run.end.message else ""
    return (
        f'<header><h1>{html.escape(_stage(run) or "run")}</h1><span class="pill {kind}">{text}</span></header>'
        f'<p class="lead">{html.escape(str(run.run_dir))}</p>{message}'
    )


def _tiles(run: RunRecords) -> str:
    if not run.metrics:
        return '<p class="lead">No iteration has finished yet.</p>'
    tokens, seconds = run.total("tokens"), run.total("seconds")
    tiles = [
        ("Iterations", f"{run.metrics[-1]['iteration']:,}", _planned(run)),
        ("Loss", number(_at_the_end(run, "loss")), f"mean of the last {min(LATEST, len(run.metrics))} iterations"),
        (
            "Tokens",
            count(tokens),
            f"{count(run.total('images'))} images, {count(run.total('labels'))} trained tokens",
        ),
        ("Throughput", f"{ratio(tokens, seconds):,.0f}", "tokens/s over all ranks, without padding"),
        ("Padding", f"{run.padding:.1%}", "of the positions in the packed rows"),
        ("Data wait", f"{ratio(run.total('data_wait'), seconds):.1%}", "of the time in steps, waiting for the loader"),
        ("Time in steps", duration(seconds), f"{ratio(seconds, len(run.metrics)):.3g} s per iteration"),
        _speed_tile(run),
        _goodput_tile(run),
    ]
    cells = (
        f'<div class="tile"><span>{name}</span><b>{value}</b><span>{note}</span></div>' for name, value, note in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _planned(run: RunRecords) -> str:
    training = run.config.get("training")
    planned = training.get("train_iters") if isinstance(training, dict) else None
    return f"of {planned:,} planned" if isinstance(planned, int) else "done"


def _speed_tile(run: RunRecords) -> tuple[str, str, str]:
    mfu = run.series("mfu")[1]
    teraflops = f"{mean(run.series('tflops_per_rank')[1]):.3g}"
    if mfu:
        return "MFU", f"{mean(mfu):.1%}", f"of peak; {teraflops} TFLOP/s per rank"
    return "TFLOP/s per rank", teraflops, "no MFU: the peak of this device is not known"


def _goodput_tile(run: RunRecords) -> tuple[str, str, str]:
    if run.time_spent is None:
        return "Goodput", "-", "not known: events.jsonl tells of no first step"
    note = f"of {duration(run.time_spent.total)} went into steps that count"
    return "Goodput", f"{run.time_spent.goodput:.1%}", note


def _charts(run: RunRecords) -> list[str]:
    """Return a section for each quantity in the records."""
    if not run.metrics:
        return []
    named = [(name, f"{_LOSS}/{name}") for name in run.names(f"{_LOSS}/")] or [("all datasets", _LOSS)]
    validation = [(name, f"{_VALIDATION}/{name}") for name in run.names(f"{_VALIDATION}/")]
    validation += [("all datasets", _VALIDATION)] if len(validation) != 1 else []
    return [
        _chart(run, "Loss by dataset", named, unit="loss per trained token", log=True),
        _chart(run, "Validation loss", validation, unit="loss per trained token", log=True, markers=True),
        _chart(run, "Gradient norm", [("norm before clipping", "grad_norm")], unit="norm", log=True),
        _chart(run, "Learning rate", [("learning rate", "learning_rate")], unit="learning rate", from_zero=True),
        _chart(run, "Throughput", [("tokens/s", "tokens_per_s")], unit="tokens/s", from_zero=True),
        _chart(run, "Padding", [("padding", "padding")], unit="% of positions", scale=100.0, from_zero=True),
        _chart(run, "Data wait", [("wait", "data_wait")], unit="ms per iteration", scale=1e3, from_zero=True),
        _chart(run, "Images of the fullest rank", [("over the mean", "image_imbalance")], unit="fullest / mean"),
        _chart(run, "MFU", [("MFU", "mfu")], unit="% of peak", scale=100.0, from_zero=True)
        or _chart(run, "Compute", [("per rank", "tflops_per_rank")], unit="TFLOP/s per rank", from_zero=True),
    ]


def _chart(
    run: RunRecords,
    title: str,
    named: Sequence[tuple[str, str]],
    *,
    unit: str,
    scale: float = 1.0,
    markers: bool = False,
    log: bool = False,
    from_zero: bool = False,
) -> str:
    """Return a chart of the given keys, or an empty string if no record has any of them."""
    lines = []
    for name, key in named:
        xs, ys = run.series(key)
        if xs:
            lines.append(Line(name=name, xs=xs, ys=[y * scale for y in ys], markers=markers or len(xs) == 1))
    if not lines:
        return ""
    # The name of a dataset matters even if there is only one; the marks are named where the losses are.
    marks = event_marks(run.events)
    figure = draw_lines(title, lines, unit=unit, log=log, from_zero=from_zero, marks=marks, legend=log)
    return f'<section class="card">{to_svg(figure)}</section>'


def _datasets(run: RunRecords) -> str:
    """Return a table of each dataset: its losses, first, latest and in validation, and what the run has seen of it."""
    rows = []
    seen = {name: _last(run, f"seen_tokens/{name}") for name in run.names("seen_tokens/")}
    all_seen = sum(seen.values())
    names = run.names(f"{_LOSS}/") + run.names(f"{_VALIDATION}/") + list(seen)
    for name in dict.fromkeys(names):
        values, validation = run.series(f"{_LOSS}/{name}")[1], run.series(f"{_VALIDATION}/{name}")[1]
        losses = [mean(values[:1]), mean(values[-LATEST:]), mean(validation[-1:])]
        tokens, passes = seen.get(name, math.nan), _last(run, f"passes/{name}")
        shown = ["-", "-"] if math.isnan(tokens) else [count(tokens), f"{ratio(tokens, all_seen):.1%}"]
        rows.append([html.escape(name), *map(number, losses), *shown, number(passes)])
    heads = [
        "dataset",
        "first loss",
        f"mean of the last {LATEST}",
        "last validation",
        "tokens seen",
        "of all",
        "passes",
    ]
    return card("Datasets", table(heads, rows)) if rows else ""


def _last(run: RunRecords, key: str) -> float:
    return mean(run.series(key)[1][-1:])


def _work(run: RunRecords) -> str:
    """Return a table of the floating-point operations done."""
    seconds = run.total("seconds")
    rows = []
    if flops := run.total("flops"):
        tokens, steps = run.total("tokens"), len(run.series("flops")[0])
        rows += [
            ["total", f"{flops:.3e}"],
            ["per iteration", f"{ratio(flops, steps):.3e}"],
            ["per token", f"{ratio(flops, tokens):.3e}"],
        ]
    pairs = [(record["tflops_per_rank"], record["seconds"]) for record in run.metrics if "tflops_per_rank" in record]
    if pairs:
        per_rank = math.fsum(speed * time for speed, time in pairs) * 1e12
        rows += [["per rank", f"{per_rank:.3e}"], ["per rank and second", f"{ratio(per_rank, seconds):.3e}"]]
    text = "<p>Forward and backward passes over real tokens and images, without padding and recomputation.</p>"
    return card("Floating-point operations", text + table(["", "FLOPs"], rows)) if rows else ""


def _configuration(run: RunRecords) -> str:
    if not run.config_text:
        return ""
    text = html.escape(run.config_text)
    return card("Configuration", f"<details open><summary>config.yaml</summary><pre>{text}</pre></details>")


def _at_the_end(run: RunRecords, key: str) -> float:
    return mean(run.series(key)[1][-LATEST:])
