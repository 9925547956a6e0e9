"""A histogram of scores whose range is not known in advance."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.platform.charts import draw_bars, save_png

_FIRST_WIDTH = 2.0**-10
_MAX_BINS = 128


class ScoreHistogram:
    """Count scores in at most 128 bins of equal width, a power of two.

    If there are too many bins, they are merged in pairs, so the result does not depend on the order of the scores.
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
        ValueError: the two have bins of different widths.
    """
    if everything.width != kept.width:
        raise ValueError(f"bins are {everything.width} and {kept.width} wide; make the second with the first's width")
    return [
        {"from": number * everything.width, "kept": kept.bins[number], "dropped": count - kept.bins[number]}
        for number, count in sorted(everything.bins.items())
    ]


def save_histogram(title: str, rows: list[dict[str, Any]], width: float, path: Path) -> None:
    """Draw the rows of `histogram_rows` as PNG: a bar for each bin, kept scores below dropped ones."""
    first = round(rows[0]["from"] / width)
    heights = {name: [0] * (round(rows[-1]["from"] / width) - first + 1) for name in ("kept", "dropped")}
    for row in rows:
        for name, counts in heights.items():
            counts[round(row["from"] / width) - first] = row[name]
    labels = [f"{(first + position) * width:.4g}" for position in range(len(heights["kept"]))]
    save_png(draw_bars(title, labels, heights, note="score"), path)
