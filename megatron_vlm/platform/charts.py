"""Bar and line charts by matplotlib, as an inline `<svg>` element or a PNG file.

The same values give the same bytes.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#3465a4", "#d9722b", "#14927f", "#8a55c9", "#c2185b", "#7d6608", "#bebebe")
GREY = COLORS[-1]
MAX_POINTS = 400
"""Most points in a line; longer series are averaged over neighbouring points."""
_MAX_TICKS = 12
_LEGEND_COLUMNS = 5
_STYLE: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "font.size": 9.0,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold dollar signs
    "svg.hashsalt": "megatron_vlm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One series of a line chart; infinities and NaN are left out."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    markers: bool = False
    """Mark each point with a dot, for series of few points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Places of one kind on the x axis of a line chart."""

    name: str
    xs: Sequence[float]
    color: str
    style: str = "--"
    """Of a vertical line, as matplotlib spells it."""
    is_tick: bool = False
    """Draw small triangles at the bottom instead of lines through the chart, for what is frequent."""


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


@_style()
def draw_bars(title: str, labels: Sequence[str], layers: Mapping[str, Sequence[float]], note: str = "") -> "Figure":
    """Draw vertical bars, with one or more layers stacked in each.

    Args:
        title: heading of the chart.
        labels: one per bar; if there are many, only some are printed.
        layers: heights of the bars by layer, lowest layer first. With a single layer, the heights are printed above the
            bars; several layers get a legend.
        note: text below the x axis.
    """
    figure, axes = _begin(title, height=3.0)
    bottoms = [0.0] * len(labels)
    for number, (name, heights) in enumerate(layers.items()):
        bars = axes.bar(range(len(labels)), heights, bottom=bottoms, color=_color(number, len(layers)), label=name)
        if len(layers) == 1 and len(labels) <= _MAX_TICKS:
            axes.bar_label(bars, labels=[f"{height:,.6g}" for height in heights], fontsize="small")
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    step = max(1, math.ceil(len(labels) / _MAX_TICKS))
    axes.set_xticks(range(0, len(labels), step), [labels[place] for place in range(0, len(labels), step)])
    if len(layers) > 1:
        _add_legend(axes, len(layers))
    if note:
        axes.set_xlabel(note)
    return figure


@_style()
def draw_lines(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str,
    log: bool = False,
    from_zero: bool = False,
    marks: Sequence[Mark] = (),
    legend: bool = False,
    x_label: str = "iteration",
) -> "Figure":
    """Draw lines over the iterations of a run.

    Args:
        title: heading of the chart.
        lines: the series; long ones are averaged over neighbouring points.
        unit: label of the y axis.
        log: use a logarithmic y axis and leave out values that are not positive.
        from_zero: start the y axis at zero.
        marks: events to show.
        legend: name a single line and the marks, too; several lines always get a legend.
        x_label: label of the x axis.
    """
    num_named = len(lines) + (len(marks) if legend else 0)
    # Each further row of the legend gets room of its own.
    figure, axes = _begin(title, height=2.8 + 0.22 * (max(0, num_named - 1) // _LEGEND_COLUMNS))
    for number, line in enumerate(lines):
        xs, ys = average_points(line.xs, line.ys, positive=log)
        cycle, color = divmod(number, len(COLORS))
        style = ("-", "--", ":", "-.")[cycle % 4]
        axes.plot(xs, ys, style, color=COLORS[color], label=line.name, marker="." if line.markers else None)
    low, high = axes.dataLim.intervaly
    # In a smaller range, a logarithmic axis would have hardly any ticks.
    if log and high > 4 * low:
        axes.set_yscale("log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(_plain_number)
    elif from_zero:
        axes.set_ylim(bottom=0)
    for mark in marks:
        _draw_mark(axes, mark, label=mark.name if legend else "_")
    axes.grid(axis="y", which="both", color="#e1e5ea")
    axes.set_xlabel(x_label)
    axes.set_ylabel(unit)
    if legend or len(lines) > 1:
        _add_legend(axes, num_named)
    return figure


def _draw_mark(axes: "Axes", mark: Mark, label: str) -> None:
    if mark.is_tick:
        bottom, across = [0.02] * len(mark.xs), axes.get_xaxis_transform()
        axes.plot(mark.xs, bottom, "^", color=mark.color, markersize=5, transform=across, label=label)
        return
    for number, x in enumerate(mark.xs):  # a label that starts with "_" is left out of the legend
        axes.axvline(x, color=mark.color, linestyle=mark.style, linewidth=1.0, label="_" if number else label)


def average_points(
    xs: Sequence[float], ys: Sequence[float], *, positive: bool = False, count: int = MAX_POINTS
) -> tuple[list[float], list[float]]:
    """Return at most `count` points, each the mean of neighbouring ones.

    Args:
        xs: places, in order.
        ys: values; infinities and NaN are left out.
        positive: leave out zero and negative values, too.
        count: most points to return.
    """
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y) and (y > 0 or not positive)]
    size = max(1, math.ceil(len(pairs) / count))
    groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return (
        [sum(x for x, _ in group) / len(group) for group in groups],
        [sum(y for _, y in group) / len(group) for group in groups],
    )


@_style()
def to_svg(figure: "Figure") -> str:
    """Return the figure as an `<svg>` element for an HTML page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    # Group ids would be duplicates on a page with several charts; nothing refers to them.
    return re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])


@_style()
def save_png(figure: "Figure", path: Path) -> None:
    """Write the figure as a PNG file."""
    figure.savefig(path, format="png", dpi=100, metadata={"Software": None})


def _begin(title: str, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    # Without pyplot there is no window and no global state.
    figure = Figure(figsize=(9.0, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    return figure, axes


def _add_legend(axes: "Axes", num_entries: int) -> None:
    # Next to the title, where it covers nothing.
    if num_entries:
        axes.legend(
            frameon=False,
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=min(num_entries, _LEGEND_COLUMNS),
            borderpad=0.0,
        )


def _plain_number(value: float, position: float) -> str:
    digits = f"{value:.0e}"[0]
    return f"{value:g}" if digits in "125" else ""


def _color(number: int, num_layers: int) -> str:
    return GREY if num_layers > 1 and number == num_layers - 1 else COLORS[number % len(COLORS)]
