"""Pack samples into rows of a fixed length without cutting one."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Samples in rows."""

    order: np.ndarray
    """int64[n]; positions of the samples, row after row."""
    borders: np.ndarray
    """int64[rows + 1]; row i is order[borders[i] : borders[i + 1]]."""


@dataclass(frozen=True, slots=True)
class RowPatterns:
    """Kinds of rows, each a set of sample lengths, and how often each is used."""

    lengths: np.ndarray
    """int64[m]; lengths of all patterns, pattern after pattern [tokens]."""
    borders: np.ndarray
    """int64[patterns + 1]; pattern i is lengths[borders[i] : borders[i + 1]]."""
    uses: np.ndarray
    """int64[patterns]; rows of each kind."""

    @property
    def num_rows(self) -> int:
        """Rows of all kinds together."""
        return int(self.uses.sum())


def pack_samples(lengths: np.ndarray, seq_length: int, rng: np.random.Generator) -> PackedRows:
    """Put every sample into exactly one row.

    Which lengths share a row is decided on the histogram of lengths; which samples of a length go where is left to
    chance, so that rows stay random mixtures. The samples of a row are in random order.

    Args:
        lengths: int[n], 1 to seq_length [tokens].
        seq_length: length of a row [tokens].
        rng: source of all randomness.

    Raises:
        ValueError: a length is outside 1 to seq_length.
    """
    if lengths.size and not 1 <= int(lengths.min()) <= int(lengths.max()) <= seq_length:
        raise ValueError(f"lengths reach from {lengths.min()} to {lengths.max()}, a row has 1 to {seq_length} tokens")
    # numpy sorts 16-bit integers by radix: ten times faster than a comparison sort.
    kind: Any = np.uint16 if seq_length <= np.iinfo(np.uint16).max else np.uint32
    lengths = lengths.astype(kind)
    patterns = find_patterns(np.bincount(lengths, minlength=seq_length + 1), seq_length)
    sizes = np.diff(patterns.borders)
    borders = np.concatenate([[0], np.cumsum(np.repeat(sizes, patterns.uses))])
    slots = _shuffled_slots(patterns, sizes, rng, kind)
    # Both sorts are stable, so the i-th slot of a length meets the i-th sample of that length in random order.
    shuffled = rng.permutation(len(lengths))
    order = np.empty(len(lengths), dtype=np.int64)
    order[np.argsort(slots, kind="stable")] = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    return PackedRows(order, borders)


def _shuffled_slots(patterns: RowPatterns, sizes: np.ndarray, rng: np.random.Generator, kind: Any) -> np.ndarray:
    """Return the length of every slot, row after row, each row in an order of its own."""
    total = int((sizes * patterns.uses).sum())
    slots = np.empty(total, dtype=kind)
    begin = np.concatenate([[0], np.cumsum(sizes * patterns.uses)])
    for index, uses in enumerate(patterns.uses):
        row = patterns.lengths[patterns.borders[index] : patterns.borders[index + 1]].astype(kind)
        block = slots[begin[index] : begin[index + 1]].reshape(uses, len(row))
        block[:] = row
        if len(row) > 1:
            rng.permuted(block, axis=1, out=block)
    return slots


def find_patterns(counts: np.ndarray, seq_length: int) -> RowPatterns:
    """Choose patterns that use up the histogram of lengths in few rows.

    Args:
        counts: int64[seq_length + 1]; samples of each length.
        seq_length: length of a row [tokens].
    """
    remaining = counts.copy()
    lengths: list[int] = []
    borders, uses = [0], []
    while True:
        available = np.flatnonzero(remaining)
        if not available.size:
            break
        pattern: dict[int, int] = {}
        gap = seq_length
        while True:
            position = int(np.searchsorted(available, gap, side="right"))
            while position and pattern.get(int(available[position - 1]), 0) >= remaining[available[position - 1]]:
                position -= 1
            if not position:
                break
            length = int(available[position - 1])
            pattern[length] = pattern.get(length, 0) + 1
            gap -= length
        times = min(int(remaining[length]) // number for length, number in pattern.items())
        for length, number in pattern.items():
            remaining[length] -= number * times
            lengths.extend([length] * number)
        borders.append(len(lengths))
        uses.append(times)
    return RowPatterns(*(np.array(values, dtype=np.int64) for values in (lengths, borders, uses)))
