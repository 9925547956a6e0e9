"""A histogram of scores whose range is not known before all of them have passed."""

from collections import Counter
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

_FIRST_WIDTH = 2.0**-10
_MAX_BINS = 128
_BAR_PIXELS, _PLOT_HEIGHT, _MARGIN = 6, 240, 50
_KEPT, _DROPPED, _BLACK, _GREY = (52, 101, 164), (190, 190, 190), (0, 0, 0), (150, 150, 150)


class ScoreHistogram:
    """Count scores in at most 128 bins of one width, a power of two.

    Bins are merged in pairs when there are too many, so that the result does not depend on the order of the scores.
    """

    def __init__(self, width: float = _FIRST_WIDTH) -> None:
        self.width = width
        self.bins: Counter[int] = Counter()
        """Number of scores by bin; bin i holds `i * width <= score < (i + 1) * width`."""

    def add(self, scores: np.ndarray) -> None:
        """Count finite scores, float64[n]."""
        if not len(scores):
            return
        while scores.max() / self.width - scores.min() / self.width > 4 * _MAX_BINS:
            self._widen()
        numbers, counts = np.unique(np.floor(scores / self.width), return_counts=True)
        self.bins.update(dict(zip(map(int, numbers.tolist()), counts.tolist(), strict=True)))
        while max(self.bins) - min(self.bins) >= _MAX_BINS:
            self._widen()

    def _widen(self) -> None:
        merged: Counter[int] = Counter()
        for number, count in self.bins.items():
            merged[number // 2] += count
        self.width, self.bins = self.width * 2, merged


def histogram_rows(everything: ScoreHistogram, kept: ScoreHistogram) -> list[dict[str, Any]]:
    """Return lower border, kept and dropped scores of each bin, for a report.

    Raises:
        ValueError: the two differ in the width of their bins.
    """
    if everything.width != kept.width:
        raise ValueError(f"bins are {everything.width} and {kept.width} wide; make the second with the first's width")
    return [
        {"from": number * everything.width, "kept": kept.bins[number], "dropped": count - kept.bins[number]}
        for number, count in sorted(everything.bins.items())
    ]


def draw_histogram(title: str, rows: list[dict[str, Any]], width: float) -> Image.Image:
    """Draw the rows of `histogram_rows`: kept in blue on top of dropped in grey, linear in the number of scores."""
    first = round(rows[0]["from"] / width)
    count = round(rows[-1]["from"] / width) - first + 1
    size = (max(count * _BAR_PIXELS, 7 * len(title)) + 2 * _MARGIN, _PLOT_HEIGHT + 2 * _MARGIN)
    image = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(image)
    highest = max(row["kept"] + row["dropped"] for row in rows)
    bottom = _MARGIN + _PLOT_HEIGHT
    draw.text((_MARGIN, 8), title, fill=_BLACK)
    draw.text((_MARGIN, 24), f"blue: kept, grey: dropped; highest bar {highest}", fill=_GREY)
    for row in rows:
        left = _MARGIN + (round(row["from"] / width) - first) * _BAR_PIXELS
        middle = bottom - round(row["dropped"] / highest * _PLOT_HEIGHT)
        top = bottom - round((row["kept"] + row["dropped"]) / highest * _PLOT_HEIGHT)
        if row["dropped"]:
            draw.rectangle((left, middle, left + _BAR_PIXELS - 2, bottom), fill=_DROPPED)
        if row["kept"]:
            draw.rectangle((left, top, left + _BAR_PIXELS - 2, middle), fill=_KEPT)
    draw.line((_MARGIN - 4, bottom, size[0] - _MARGIN, bottom), fill=_BLACK)
    for position in range(0, count, max(1, count // 8)):
        draw.text((_MARGIN + position * _BAR_PIXELS, bottom + 6), f"{(first + position) * width:.4g}", fill=_BLACK)
    return image
