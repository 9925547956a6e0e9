"""Choose which sample lengths go into a row together, from the histogram of lengths.

This is the cutting-stock problem: use up all lengths in as few rows as possible. Image tokens make lengths lumpy (a
row of 4096 holds seven images of 576 tokens and 64 tokens of text, or six and 640), so filling every row as far as
possible is not optimal: short texts are precious where they make room for a seventh image, and wasted elsewhere. So
each length has a price, and the row of the highest price around the longest remaining sample is formed first.

Three kinds of prices are tried, the cheapest first, until one comes close to the lower bound on the number of rows:

- by length, filling each row with the longest sample that fits (first fit decreasing): near the optimum if many
  short samples fill the gaps;
- by a staircase that counts how many of k equal parts of a row a length takes, with a ramp at each step. For
  image-like lengths the dual of the problem has this form. Since the sum of all prices divided by the price of the best
  row bounds the number of rows from below, the best staircase is found without packing anything. On COYO-like lengths
  the bound equals the optimum of the linear program, and packing comes within 0.2 % of it;
- learned: a length that was often in rows with gaps gets a higher price the next time.

Sources: Fekete and Schepers, New classes of fast lower bounds for bin packing problems, Math. Programming 91 (2001),
for the staircase; Belov and Scheithauer, Setup and open-stacks minimization in one-dimensional stock cutting, INFORMS
Journal on Computing 19 (2007), for learning prices (sequential value correction).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_MAX_STAIRS = 32
_SLOPES = (1.0, 10.0, 30.0, 55.0, 100.0, 1000.0)
# Among rows of equal price: fuller ones first, then those with lengths that many samples still have, so that no length
# runs out before the others. Neither weight of fullness is better for all data.
_FILL_PREFERENCES = (1e-1, 1e-2)
_SUPPLY_PREFERENCE = 1e-5
_LEARNING_ROUNDS = 5
# A packing within this factor of the bound ends the search. With few rows, the first search ends it; with very few,
# there is no search.
_GOOD_ENOUGH = 1.001
_FEW_ROWS = 5000
_VERY_FEW_ROWS = 20
_UNAVAILABLE = -1e9
# The table of best values is renewed whenever this fraction of the lengths has run out.
_RENEWALS = 12
_MIN_STALE = 16


@dataclass(frozen=True, slots=True)
class RowPatterns:
    """Patterns of rows: the sample lengths in a row, and how often each pattern is used."""

    lengths: np.ndarray
    """int64[m]; lengths of all patterns, pattern by pattern [tokens]."""
    borders: np.ndarray
    """int64[patterns + 1]; pattern i is lengths[borders[i] : borders[i + 1]]."""
    uses: np.ndarray
    """int64[patterns]; rows with each pattern."""

    @property
    def num_rows(self) -> int:
        """Rows of all patterns together."""
        return int(self.uses.sum())


def find_patterns(counts: np.ndarray, seq_length: int) -> RowPatterns:
    """Choose patterns that use up the histogram of lengths in as few rows as possible.

    Args:
        counts: int[seq_length + 1]; samples of each length; there are none of length 0.
        seq_length: length of a row [tokens].
    """
    if not counts.any():
        return RowPatterns(np.empty(0, dtype=np.int64), np.zeros(1, dtype=np.int64), np.empty(0, dtype=np.int64))
    counts = counts.astype(np.int64)
    fraction = np.arange(seq_length + 1) / seq_length
    best, fewest_rows = _pack_by_length(counts, seq_length), float(counts @ fraction)
    if best.num_rows <= max(_GOOD_ENOUGH * fewest_rows, _VERY_FEW_ROWS):
        return best
    prices, staircase_rows = _choose_staircase(counts, seq_length)
    searches: Iterator[RowPatterns]
    if staircase_rows > _GOOD_ENOUGH * fewest_rows:
        fewest_rows = staircase_rows
        searches = (_search(counts, prices + preference * fraction) for preference in _FILL_PREFERENCES)
    else:
        searches = _search_learning(counts, fraction)
    for found in searches:
        best = min(best, found, key=lambda patterns: patterns.num_rows)
        if best.num_rows <= max(_GOOD_ENOUGH * fewest_rows, _FEW_ROWS):
            break
    return best


def staircase_prices(seq_length: int, stairs: int, slope: float) -> np.ndarray:
    """Return the price of every length [rows].

    A length of n / (stairs + 1) rows has that price; around it the price rises by `slope` per row of length, from a
    multiple of 1 / stairs to the next one.

    Returns:
        float64[seq_length + 1].
    """
    fraction = np.arange(seq_length + 1) / seq_length
    step = np.rint((stairs + 1) * fraction)
    ramp = step / (stairs + 1) + slope * (fraction - step / (stairs + 1))
    return np.clip(ramp, np.maximum(step - 1, 0) / stairs, np.minimum(step / stairs, 1))


def best_values(prices: np.ndarray, available: np.ndarray) -> np.ndarray:
    """Return the highest price of a row of each size, with any number of samples of each length.

    Args:
        prices: float64[seq_length + 1].
        available: int[n]; lengths that may be used, ascending, n > 0.

    Returns:
        float64[seq_length + 1], reversed: element i is for a row of seq_length - i tokens.
    """
    seq_length, shortest, longest = len(prices) - 1, int(available[0]), int(available[-1])
    offered = np.full(longest - shortest + 1, _UNAVAILABLE)
    offered[available - shortest] = prices[available]
    # Reversed, so that the sum below reads two contiguous stretches of memory.
    result = np.zeros(seq_length + 1)
    total, best = np.empty_like(offered), 0.0
    for size in range(shortest, seq_length + 1):
        number = min(longest, size) - shortest + 1
        first = seq_length - size
        last_sample = np.add(offered[:number], result[first + shortest : first + shortest + number], out=total[:number])
        best = max(best, float(last_sample.max()))
        result[first] = best
    return result


def _choose_staircase(counts: np.ndarray, seq_length: int) -> tuple[np.ndarray, float]:
    """Return the prices that give the best lower bound on the number of rows, and the bound."""
    lengths = np.flatnonzero(counts)

    def bound_plainly(stairs: int) -> float:
        # Without ramps no row is worth more than 1, so no table is needed.
        step, rest = np.divmod((stairs + 1) * lengths, seq_length)
        return float(counts[lengths] @ np.where(rest == 0, step / (stairs + 1), step / stairs))

    def bound(slope: float) -> float:
        prices = staircase_prices(seq_length, stairs, slope)
        best_row = float(best_values(prices, lengths)[0])
        return float(counts @ prices) / best_row if best_row else 0.0

    stairs = max(range(1, _MAX_STAIRS + 1), key=bound_plainly)
    slope = max(_SLOPES, key=bound)
    return staircase_prices(seq_length, stairs, slope), bound(slope)


def _search_learning(counts: np.ndarray, prices: np.ndarray) -> Iterator[RowPatterns]:
    """Pack repeatedly, each time with prices learned from the previous packing."""
    for _ in range(_LEARNING_ROUNDS):
        found = _search(counts, prices)
        yield found
        filled = np.add.reduceat(found.lengths, found.borders[:-1])
        pattern = np.repeat(np.arange(len(found.uses)), np.diff(found.borders))
        uses = found.uses[pattern]
        paid = np.bincount(found.lengths, weights=uses * found.lengths / filled[pattern], minlength=len(counts))
        prices = np.where(counts > 0, (prices + paid / np.maximum(counts, 1)) / 2, prices)


def _search(counts: np.ndarray, prices: np.ndarray) -> RowPatterns:
    """Use up all lengths, forming the rows of the highest price first."""
    search = _PatternSearch(counts, prices)
    collected = PatternCollector()
    while search.available.size:
        collected.add(*search.take())
    return collected.patterns()


def _pack_by_length(counts: np.ndarray, seq_length: int) -> RowPatterns:
    """Fill every row with the longest sample that fits, again and again."""
    counts, collected = counts.copy(), PatternCollector()
    available = np.flatnonzero(counts)
    while available.size:
        pattern: dict[int, int] = {}
        gap, position = seq_length, len(available)
        while position := min(position, int(np.searchsorted(available, gap, side="right"))):
            length = int(available[position - 1])
            pattern[length] = min(gap // length, int(counts[length]))
            gap -= length * pattern[length]
            position -= 1
        times = min(int(counts[length]) // number for length, number in pattern.items())
        for length, number in pattern.items():
            counts[length] -= number * times
        available = available[counts[available] > 0]
        collected.add(pattern, times)
    return collected.patterns()


class PatternCollector:
    """Collects the patterns found so far; their items are lengths, or kinds of samples."""

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self._borders, self._uses = [0], list[int]()

    def add(self, pattern: dict[int, int], times: int) -> None:
        """Add a pattern, the number of samples of each item, that is used `times` times."""
        for length, number in pattern.items():
            self._lengths += [length] * number
        self._borders.append(len(self._lengths))
        self._uses.append(times)

    def patterns(self) -> RowPatterns:
        """Return all of them, in order."""
        arrays = (np.array(values, dtype=np.int64) for values in (self._lengths, self._borders, self._uses))
        return RowPatterns(*arrays)


class _PatternSearch:
    """The remaining lengths, their prices, and the best value of every gap."""

    def __init__(self, counts: np.ndarray, prices: np.ndarray) -> None:
        self.counts, self.seq_length = counts.copy(), len(counts) - 1
        self.available = np.flatnonzero(counts)
        self._base_prices = prices
        self._max_stale = max(_MIN_STALE, self.available.size // _RENEWALS)
        self._stale = self._max_stale

    def take(self) -> tuple[dict[int, int], int]:
        """Take the best pattern around the longest remaining length, as often as the counts allow."""
        if self._stale >= self._max_stale:
            self._renew()
        pattern = self._fill(int(self.available[-1]))
        times = min(int(self.counts[length]) // number for length, number in pattern.items())
        for length, number in pattern.items():
            self.counts[length] -= number * times
            if self.counts[length]:
                self._offered[length] = self._prices[length]
            else:
                self._offered[length] = _UNAVAILABLE
                self._stale += 1
        if not self.counts[self.available[-1]]:
            self.available = np.flatnonzero(self.counts)
        return pattern, times

    def _fill(self, length: int) -> dict[int, int]:
        """Return how many samples of each length form the best row that contains `length`."""
        pattern: dict[int, int] = {}
        shortest, gap = int(self.available[0]), self.seq_length
        while True:
            pattern[length] = pattern.get(length, 0) + 1
            if pattern[length] == self.counts[length]:
                self._offered[length] = _UNAVAILABLE
            gap -= length
            if gap < shortest:
                return pattern
            first = self.seq_length - gap + shortest
            values = self._offered[shortest : gap + 1] + self._best[first:]
            choice = int(values.argmax())
            if values[choice] < 0:
                return pattern
            length = shortest + choice

    def _renew(self) -> None:
        self._prices = self._base_prices + _SUPPLY_PREFERENCE * np.log(np.maximum(self.counts, 1))
        self._best = best_values(self._prices, self.available)
        self._offered = np.full(self.seq_length + 1, _UNAVAILABLE)
        self._offered[self.available] = self._prices[self.available]
        self._stale = 0
