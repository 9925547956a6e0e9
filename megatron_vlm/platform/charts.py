"""Bar and line charts, drawn by matplotlib: as an `<svg>` element of a page or as a PNG file.

The same values give the same bytes, so that two reports of one run can be compared.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#3465a4", "#d9722b", "#14927f", "#8a55c9", "#c2185b", "#7d6608", "#bebebe")
GREY = COLORS[-1]
MARK_COLOR = "#b3261e"
MAX_POINTS = 400
"""Points that a line is drawn with; a longer series is averaged over neighbours."""
_MAX_TICKS = 12
_STYLE: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "font.size": 9.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron_vlm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One series of a line chart; values that are not finite are left out."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    markers: bool = False
    """Whether each point gets a dot, as for a series of few points."""


def draw_bars(title: str, labels: Sequence[str], layers: Mapping[str, Sequence[float]], note: str = "") -> "Figure":
    """Draw vertical bars of one or more layers stacked on each other.

    Args:
        title: heading of the chart.
        labels: one for each bar; only some are printed where there are many.
        layers: heights of the bars by the name of the layer, the lowest layer first. The heights are printed above the
            bars of a single layer; several layers get a legend.
        note: a line below the chart.
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
    _add_legend(axes, len(layers))
    if note:
        axes.set_xlabel(note)
    return figure


def draw_lines(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str,
    log: bool = False,
    from_zero: bool = False,
    marks: Sequence[float] = (),
) -> "Figure":
    """Draw lines over the iterations of a run.

    Args:
        title: heading of the chart.
        lines: the series; a long one is drawn as the mean over neighbours.
        unit: label of the y axis.
        log: whether the y axis is logarithmic; values that are not positive are left out.
        from_zero: whether the y axis begins at zero.
        marks: iterations with a dashed vertical line.
    """
    figure, axes = _begin(title, height=2.8)
    for number, line in enumerate(lines):
        xs, ys = average_points(line.xs, line.ys, positive=log)
        axes.plot(xs, ys, color=COLORS[number % len(COLORS)], label=line.name, marker="." if line.markers else None)
    low, high = axes.dataLim.intervaly
    # Within a smaller range a logarithmic axis has hardly a tick.
    if log and high > 4 * low:
        axes.set_yscale("log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(_plain_number)
    elif from_zero:
        axes.set_ylim(bottom=0)
    for mark in marks:
        axes.axvline(mark, color=MARK_COLOR, linestyle="--", linewidth=0.8)
    axes.grid(axis="y", which="both", color="#e1e5ea")
    axes.set_xlabel("iteration")
    axes.set_ylabel(unit)
    _add_legend(axes, len(lines))
    return figure


def average_points(
    xs: Sequence[float], ys: Sequence[float], *, positive: bool = False, count: int = MAX_POINTS
) -> tuple[list[float], list[float]]:
    """Return at most `count` points, each the mean of neighbours.

    Args:
        xs: places, in order.
        ys: values; those that are not finite are left out.
        positive: whether values of zero and below are left out as well.
        count: points to return at most.
    """
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y) and (y > 0 or not positive)]
    size = max(1, math.ceil(len(pairs) / count))
    groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return (
        [sum(x for x, _ in group) / len(group) for group in groups],
        [sum(y for _, y in group) / len(group) for group in groups],
    )


def to_svg(figure: "Figure") -> str:
    """Return the figure as an `<svg>` element that can stand in an HTML page."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    # The names of groups repeat in every chart of a page, and nothing refers to them.
    return re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])


def save_png(figure: "Figure", path: Path) -> None:
    """Write the figure as a PNG file."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure.savefig(path, format="png", dpi=100, metadata={"Software": None})


def _begin(title: str, height: float) -> "tuple[Figure, Axes]":
    import matplotlib
    from matplotlib.figure import Figure

    # A figure without pyplot has no window and no global state.
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.0, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, loc="left")
    return figure, axes


def _add_legend(axes: "Axes", num_entries: int) -> None:
    if num_entries > 1:
        # Above the axes, on the line of the title: nothing of the chart is covered.
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=num_entries, borderpad=0.0)


def _plain_number(value: float, position: float) -> str:
    digits = f"{value:.0e}"[0]
    return f"{value:g}" if digits in "125" else ""


def _color(number: int, num_layers: int) -> str:
    return GREY if num_layers > 1 and number == num_layers - 1 else COLORS[number % len(COLORS)]
