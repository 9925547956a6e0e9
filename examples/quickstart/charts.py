"""Line and bar charts as inline SVG, coloured by the report's style sheet."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

_WIDTH = 960
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 18, 26, 42
_MAX_POINTS = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int = 0
    """Number of a colour of the style sheet, from 0."""
    dashed: bool = False
    smooth: bool = True
    """Whether the line is the mean over neighbouring points, with the points themselves faint behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A named range of the x axis, such as a training stage."""

    start: float
    stop: float
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """A vertical line with a label, such as a kill."""

    x: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LineChart:
    """Lines over a common x axis."""

    title: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    bands: Sequence[Band] = ()
    markers: Sequence[Marker] = ()
    y_from_zero: bool = False
    y_percent: bool = False
    y_log: bool = False
    """Logarithmic y axis; values that are not positive are left out."""
    height: int = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One horizontal bar."""

    name: str
    value: float
    text: str
    """Value as it is printed behind the bar."""
    color: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BarChart:
    """Horizontal bars from zero to `limit`."""

    title: str
    bars: Sequence[Bar]
    limit: float
    markers: Sequence[Marker] = field(default=())


def choose_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high], about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def average_points(xs: Sequence[float], ys: Sequence[float], count: int) -> tuple[list[float], list[float]]:
    """Return at most `count` points, each the mean of its neighbours; finite values only."""
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    size = max(1, math.ceil(len(pairs) / count))
    groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return (
        [sum(x for x, _ in group) / len(group) for group in groups],
        [sum(y for _, y in group) / len(group) for group in groups],
    )


def draw_lines(chart: LineChart) -> str:
    """Return the chart as an `<svg>` element with a legend and a tooltip on each smoothed point."""
    values = [y for series in chart.series for y in series.ys if math.isfinite(y) and not (chart.y_log and y <= 0)]
    places = [x for series in chart.series for x in series.xs]
    if not values or not places:
        return f'<p class="empty">{html.escape(chart.title)}: no values.</p>'
    axes = _Axes.around(places, values, chart)
    parts = [_draw_band(band, number, axes) for number, band in enumerate(chart.bands)]
    parts += _draw_grid(chart, axes)
    for series in chart.series:
        parts += _draw_series(series, axes, percent=chart.y_percent)
    parts += [_draw_marker(marker, axes) for marker in chart.markers]
    return _frame(chart.title, chart.height, parts) + _legend(chart.series)


def draw_bars(chart: BarChart) -> str:
    """Return the chart as an `<svg>` element, one row a bar, name on the left and value behind the bar."""
    row, left, right = 40, 290, 80
    height = _TOP + row * len(chart.bars) + 12
    scale = (_WIDTH - left - right) / chart.limit
    parts = []
    for number, bar in enumerate(chart.bars):
        y = _TOP + number * row
        width = max(1.5, bar.value * scale)
        note = f'<tspan class="note" x="{left - 12}" dy="14">{html.escape(bar.note)}</tspan>' if bar.note else ""
        name_y = y + (13 if bar.note else 20)
        parts += [
            f'<text class="name" x="{left - 12}" y="{name_y}" text-anchor="end">{html.escape(bar.name)}{note}</text>',
            f'<rect class="bar c{bar.color}" x="{left}" y="{y + 4}" width="{width:.1f}" height="22" rx="4">'
            f"<title>{html.escape(bar.name)}: {html.escape(bar.text)}</title></rect>",
            f'<text class="value" x="{left + width + 8:.1f}" y="{y + 20}">{html.escape(bar.text)}</text>',
        ]
    for marker in chart.markers:
        x = left + marker.x * scale
        parts += [
            f'<line class="marker" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 4}" y2="{height - 8}"/>',
            f'<text class="marker" x="{x:.1f}" y="{_TOP - 10}" text-anchor="middle">{html.escape(marker.label)}</text>',
        ]
    return _frame(chart.title, height, parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axes:
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    height: int
    y_log: bool = False

    @classmethod
    def around(cls, places: Sequence[float], values: Sequence[float], chart: LineChart) -> "_Axes":
        edges = list(places) + [edge for band in chart.bands for edge in (band.start, band.stop)]
        low, high = _y_range(sorted(values), chart)
        return cls(
            x_low=min(edges),
            x_high=max(edges) if max(edges) > min(edges) else min(edges) + 1,
            y_low=low,
            y_high=high,
            height=chart.height,
            y_log=chart.y_log,
        )

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        inside = min(max(value, self.y_low), self.y_high)
        if self.y_log:
            share = math.log(inside / self.y_low) / math.log(self.y_high / self.y_low)
        else:
            share = (inside - self.y_low) / (self.y_high - self.y_low)
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)

    def y_ticks(self) -> list[float]:
        if not self.y_log:
            return choose_ticks(self.y_low, self.y_high)
        powers = range(math.floor(math.log10(self.y_low)), math.ceil(math.log10(self.y_high)) + 1)
        ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        return [round(tick, 12) for tick in ticks if self.y_low <= tick <= self.y_high]


def _y_range(ordered: Sequence[float], chart: LineChart) -> tuple[float, float]:
    if chart.y_log:
        return ordered[0] / 1.2, ordered[-1] * 1.2
    # A few outliers may leave the frame at the top, so that all others are not squeezed.
    high = ordered[min(len(ordered) - 1, int(len(ordered) * 0.995))]
    low = 0.0 if chart.y_from_zero else ordered[0]
    margin = (high - low) * 0.06 or max(abs(high), 1.0) * 0.06
    return low if chart.y_from_zero else low - margin, 1.0 if chart.y_percent else high + margin


def _frame(title: str, height: float, parts: Sequence[str]) -> str:
    label = html.escape(title)
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _draw_band(band: Band, number: int, axes: _Axes) -> str:
    left, right = axes.x(band.start), axes.x(band.stop)
    return (
        f'<rect class="band b{number % 2}" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" '
        f'height="{axes.height - _TOP - _BOTTOM}"/>'
        f'<text class="band" x="{(left + right) / 2:.1f}" y="{_TOP - 9}" text-anchor="middle">'
        f"{html.escape(band.name)}</text>"
    )


def _draw_grid(chart: LineChart, axes: _Axes) -> list[str]:
    bottom = axes.height - _BOTTOM
    parts = []
    for tick in axes.y_ticks():
        y = axes.y(tick)
        text = f"{tick:.0%}" if chart.y_percent else f"{tick:,.10g}"
        parts += [
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>',
        ]
    for tick in choose_ticks(axes.x_low, axes.x_high, 8):
        parts.append(
            f'<text class="tick" x="{axes.x(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{tick:,.10g}</text>'
        )
    middle = (_TOP + bottom) / 2
    return parts + [
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>',
        f'<text class="label" x="{_WIDTH - _RIGHT}" y="{bottom + 34}" text-anchor="end">'
        f"{html.escape(chart.x_label)}</text>",
        f'<text class="label" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(chart.y_label)}</text>",
    ]


def _draw_series(series: Series, axes: _Axes, *, percent: bool) -> list[str]:
    style = f"line c{series.color}" + (" dashed" if series.dashed else "")
    if not series.smooth:
        return [_draw_path(series.xs, series.ys, axes, style)]
    xs, ys = average_points(series.xs, series.ys, 60)
    faint = average_points(series.xs, series.ys, _MAX_POINTS)
    dots = [
        f'<circle class="dot c{series.color}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="5"><title>'
        f"{html.escape(series.name)} at {x:,.0f}: {f'{y:.1%}' if percent else f'{y:,.4g}'}</title></circle>"
        for x, y in zip(xs, ys, strict=True)
    ]
    return [_draw_path(*faint, axes, f"faint c{series.color}"), _draw_path(xs, ys, axes, style), *dots]


def _draw_path(xs: Sequence[float], ys: Sequence[float], axes: _Axes, style: str) -> str:
    points = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in zip(xs, ys, strict=True) if math.isfinite(y))
    return f'<polyline class="{style}" points="{points}"/>'


def _draw_marker(marker: Marker, axes: _Axes) -> str:
    x = axes.x(marker.x)
    anchor = "end" if x > _WIDTH / 2 else "start"
    offset = -6 if anchor == "end" else 6
    return (
        f'<line class="marker" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{axes.height - _BOTTOM}"/>'
        f'<text class="marker" x="{x + offset:.1f}" y="{_TOP + 14}" text-anchor="{anchor}">'
        f"{html.escape(marker.label)}</text>"
    )


def _legend(series: Sequence[Series]) -> str:
    names: dict[str, Series] = {}
    for one in series:
        names.setdefault(one.name, one)
    if len(names) < 2:
        return ""
    keys = "".join(
        f'<span class="key"><svg viewBox="0 0 22 8"><line class="line c{one.color}{" dashed" if one.dashed else ""}" '
        f'x1="1" x2="21" y1="4" y2="4"/></svg>{html.escape(name)}</span>'
        for name, one in names.items()
    )
    return f'<p class="legend">{keys}</p>'
