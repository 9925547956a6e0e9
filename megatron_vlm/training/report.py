"""The report of a run: one self-contained HTML page with its curves, events and settings."""

import html
import math
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_vlm.platform.charts import Line, draw_lines, to_svg
from megatron_vlm.training.run_records import RunRecords

_STYLE = Path(__file__).with_name("report.css")
_LOSS, _VALIDATION = "loss", "validation_loss"
"""Keys of the mean over all datasets; the loss of a dataset is under the key, "/" and its name."""
_LATEST = 100
"""Iterations that the latest means are taken over."""


def render_report(run: RunRecords) -> str:
    """Return the page.

    Args:
        run: from `read_run`; without a finished iteration, the page has no curves.
    """
    sections = [_header(run), _tiles(run), *_charts(run), _losses(run), _events(run), _work(run), _configuration(run)]
    title = html.escape(f"{_stage(run)} {run.run_dir}".strip())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>\n{_STYLE.read_text()}</style></head>\n"
        f"<body><main>\n{chr(10).join(section for section in sections if section)}\n</main></body></html>\n"
    )


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
        ("Loss", _number(_at_the_end(run, "loss")), f"mean of the last {min(_LATEST, len(run.metrics))} iterations"),
        (
            "Tokens",
            _count(tokens),
            f"{_count(run.total('images'))} images, {_count(run.total('labels'))} trained tokens",
        ),
        ("Throughput", f"{_ratio(tokens, seconds):,.0f}", "tokens/s over all ranks, without padding"),
        ("Padding", f"{run.padding:.1%}", "of the positions in the packed rows"),
        ("Data wait", f"{_ratio(run.total('data_wait'), seconds):.1%}", "of the time in steps, waiting for the loader"),
        ("Time in steps", _duration(seconds), f"{_ratio(seconds, len(run.metrics)):.3g} s per iteration"),
        _speed_tile(run),
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
    teraflops = f"{_mean(run.series('tflops_per_rank')[1]):.3g}"
    if mfu:
        return "MFU", f"{_mean(mfu):.1%}", f"of peak; {teraflops} TFLOP/s per rank"
    return "TFLOP/s per rank", teraflops, "no MFU: the peak of this device is not known"


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
    resumes = [event.iteration for event in run.events if event.is_resume and event.iteration is not None]
    # The name of a dataset matters even if there is only one.
    figure = draw_lines(title, lines, unit=unit, log=log, from_zero=from_zero, marks=resumes, legend=log)
    return f'<section class="card">{to_svg(figure)}</section>'


def _losses(run: RunRecords) -> str:
    """Return a table of the loss of each dataset: first, latest, and in validation."""
    rows = []
    for name in dict.fromkeys(run.names(f"{_LOSS}/") + run.names(f"{_VALIDATION}/")):
        values, validation = run.series(f"{_LOSS}/{name}")[1], run.series(f"{_VALIDATION}/{name}")[1]
        found = [_mean(values[:1]), _mean(values[-_LATEST:]), _mean(validation[-1:])]
        rows.append([html.escape(name), *map(_number, found)])
    names = ["dataset", "first iteration", f"mean of the last {_LATEST}", "last validation"]
    return _card("Losses", _table(names, rows)) if rows else ""


def _events(run: RunRecords) -> str:
    rows = [
        [
            "-" if event.unix_time is None else _time(event.unix_time),
            "-" if event.iteration is None else f"{event.iteration:,}",
            html.escape(event.what),
        ]
        for event in run.events
    ]
    notes = []
    if run.unreadable_lines:
        notes.append(f"{run.unreadable_lines} unreadable lines of metrics.jsonl are ignored, as a kill leaves them.")
    if any(event.is_resume for event in run.events):
        notes.append("Dashed lines in the charts mark where the run was resumed.")
    text = f"<p>{' '.join(notes)}</p>" if notes else ""
    table = _table(["time (UTC)", "iteration", "event"], rows) if rows else "<p>No events are recorded.</p>"
    return _card("Events", text + table)


def _work(run: RunRecords) -> str:
    """Return a table of the floating-point operations done."""
    seconds = run.total("seconds")
    rows = []
    if flops := run.total("flops"):
        tokens, steps = run.total("tokens"), len(run.series("flops")[0])
        rows += [
            ["total", f"{flops:.3e}"],
            ["per iteration", f"{_ratio(flops, steps):.3e}"],
            ["per token", f"{_ratio(flops, tokens):.3e}"],
        ]
    pairs = [(record["tflops_per_rank"], record["seconds"]) for record in run.metrics if "tflops_per_rank" in record]
    if pairs:
        per_rank = math.fsum(speed * time for speed, time in pairs) * 1e12
        rows += [["per rank", f"{per_rank:.3e}"], ["per rank and second", f"{_ratio(per_rank, seconds):.3e}"]]
    text = "<p>Forward and backward passes over real tokens and images, without padding and recomputation.</p>"
    return _card("Floating-point operations", text + _table(["", "FLOPs"], rows)) if rows else ""


def _configuration(run: RunRecords) -> str:
    if not run.config_text:
        return ""
    text = html.escape(run.config_text)
    return _card("Configuration", f"<details open><summary>config.yaml</summary><pre>{text}</pre></details>")


def _at_the_end(run: RunRecords, key: str) -> float:
    return _mean(run.series(key)[1][-_LATEST:])


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _ratio(count: float, of: float) -> float:
    return count / of if of else 0.0


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _count(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _time(unix_time: float) -> str:
    return datetime.fromtimestamp(unix_time, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def _card(title: str, content: str) -> str:
    return f'<section class="card"><h2>{title}</h2>{content}</section>'


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
