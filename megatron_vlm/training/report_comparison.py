"""The report of two runs: their curves over each other, the settings that differ, and their final figures."""

import html
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from megatron_vlm.platform.charts import Line, draw_lines, to_svg
from megatron_vlm.training.report_page import LATEST, card, count, duration, mean, number, ratio, render_page, table
from megatron_vlm.training.run_records import RunRecords

_CHARTS = (
    ("Loss", "loss", "loss per trained token", 1.0),
    ("Validation loss", "validation_loss", "loss per trained token", 1.0),
    ("Gradient norm", "grad_norm", "norm", 1.0),
    ("Learning rate", "learning_rate", "learning rate", 1.0),
    ("Throughput", "tokens_per_s", "tokens/s", 1.0),
    ("Padding", "padding", "% of positions", 100.0),
    ("Data wait", "data_wait_fraction", "% of the step", 100.0),
    ("MFU", "mfu", "% of peak", 100.0),
    ("Compute", "tflops_per_rank", "TFLOP/s per rank", 1.0),
)
"""Title, key, unit and factor."""
_LOGARITHMIC = ("loss", "validation_loss", "grad_norm")


def render_comparison(first: RunRecords, second: RunRecords) -> str:
    """Return the page; a run without a finished iteration has no curves.

    Args:
        first: from `read_run`.
        second: likewise; ratios are second over first.
    """
    names = _names(first, second)
    runs = dict(zip(names, (first, second), strict=True))
    head = " and ".join(html.escape(name) for name in names)
    sections = [
        f'<header><h1>{head}</h1></header><p class="lead">Two runs; iterations are their own.</p>',
        _figures(runs),
        _settings(runs),
        *_charts(runs),
    ]
    return render_page(" and ".join(names), sections)


def _names(first: RunRecords, second: RunRecords) -> tuple[str, str]:
    """Return the ends of the paths that tell the runs apart."""
    one, other = first.run_dir.resolve().parts, second.run_dir.resolve().parts
    for length in range(1, max(len(one), len(other))):
        if one[-length:] != other[-length:]:
            return "/".join(one[-length:]), "/".join(other[-length:])
    return f"{first.run_dir} (1)", f"{second.run_dir} (2)"


def _figures(runs: dict[str, RunRecords]) -> str:
    common = min(_last_iteration(run) for run in runs.values())
    lines: list[tuple[str, Callable[[RunRecords], float], Callable[[float], str]]] = [
        ("iterations", _last_iteration, "{:,.0f}".format),
        (
            f"loss, mean of up to {LATEST} iterations until {common:,}",
            lambda run: _mean_until(run, "loss", common),
            number,
        ),
        (f"loss, mean of its last {LATEST}", lambda run: _mean_until(run, "loss", math.inf), number),
        ("last validation loss", lambda run: mean(run.series("validation_loss")[1][-1:]), number),
        ("tokens", lambda run: run.total("tokens"), count),
        ("images", lambda run: run.total("images"), count),
        ("seconds per iteration", lambda run: mean(run.series("seconds")[1]), number),
        ("tokens/s, without padding", lambda run: ratio(run.total("tokens"), run.total("seconds")), "{:,.0f}".format),
        ("padding", lambda run: run.padding, "{:.1%}".format),
        ("data wait", lambda run: ratio(run.total("data_wait"), run.total("seconds")), "{:.1%}".format),
        ("TFLOP/s per rank", lambda run: mean(run.series("tflops_per_rank")[1]), number),
        ("MFU", lambda run: mean(run.series("mfu")[1]), "{:.1%}".format),
        ("images of the fullest rank over the mean", lambda run: mean(run.series("image_imbalance")[1]), number),
        ("time in steps", lambda run: run.total("seconds"), duration),
        ("goodput", lambda run: run.time_spent.goodput if run.time_spent else math.nan, "{:.1%}".format),
    ]
    rows = []
    for name, value, show in lines:
        values = [value(run) for run in runs.values()]
        if not all(map(math.isnan, values)):
            shown = ["-" if math.isnan(one) else show(one) for one in values]
            rows.append([name, *shown, number(values[1] / values[0] if values[0] else math.nan)])
    return card("Figures", table(["", *map(html.escape, runs), "second / first"], rows))


def _last_iteration(run: RunRecords) -> int:
    return run.metrics[-1]["iteration"] if run.metrics else 0


def _mean_until(run: RunRecords, key: str, last: float) -> float:
    pairs = zip(*run.series(key), strict=True)
    return mean([value for iteration, value in pairs if iteration <= last][-LATEST:])


def _settings(runs: dict[str, RunRecords]) -> str:
    one, other = (_flatten(run.config) for run in runs.values())
    rows = [
        [f"<code>{html.escape(key)}</code>", *(html.escape(str(tree.get(key, "-"))) for tree in (one, other))]
        for key in dict.fromkeys([*one, *other])
        if one.get(key, "-") != other.get(key, "-")
    ]
    text = table(["setting", *map(html.escape, runs)], rows) if rows else "<p>The settings are the same.</p>"
    return card("Settings that differ", text)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree of settings by their dotted key; what is empty is a leaf."""
    branches = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    inner = [_flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in branches]
    if not inner:
        return {prefix: tree} if prefix else {}
    return {key: value for part in inner for key, value in part.items()}


def _charts(runs: dict[str, RunRecords]) -> list[str]:
    charts = [_chart(runs, *one) for one in _CHARTS]
    return [*charts[:1], _chart(runs, *_CHARTS[0], over_tokens=True), *charts[1:]]


def _chart(
    runs: dict[str, RunRecords], title: str, key: str, unit: str, factor: float, *, over_tokens: bool = False
) -> str:
    """Return a chart with a line for each run that has the key; empty if none has."""
    lines = []
    for name, run in runs.items():
        xs, ys = run.series(key)
        places = _tokens_until(run, xs) if over_tokens else xs
        if xs:
            lines.append(Line(name=name, xs=places, ys=[factor * y for y in ys], markers=len(xs) < 30))
    if not lines:
        return ""
    figure = draw_lines(
        f"{title} over tokens" if over_tokens else title,
        lines,
        unit=unit,
        log=key in _LOGARITHMIC,
        from_zero=key not in _LOGARITHMIC,
        legend=True,
        x_label="tokens, without padding" if over_tokens else "iteration",
    )
    return f'<section class="card">{to_svg(figure)}</section>'


def _tokens_until(run: RunRecords, iterations: Sequence[int]) -> list[float]:
    """Return the tokens that a run has seen until each iteration."""
    until = itertools.accumulate(record.get("tokens") or 0 for record in run.metrics)
    seen = dict(zip((record["iteration"] for record in run.metrics), until, strict=True))
    return [seen[iteration] for iteration in iterations]
