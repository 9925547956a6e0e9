"""Pack whole samples into rows of a fixed length."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_vlm.data.plan.row_patterns import RowPatterns, find_patterns

# Longer rows are measured in cells of several tokens, because the search for patterns costs cells x lengths.
_MAX_CELLS = 8192


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Samples in rows."""

    order: np.ndarray
    """int64[n]; positions of the samples, row by row."""
    borders: np.ndarray
    """int64[rows + 1]; row i is order[borders[i] : borders[i + 1]]."""


def pack_samples(lengths: np.ndarray, seq_length: int, rng: np.random.Generator) -> PackedRows:
    """Put every sample into exactly one row.

    The histogram of lengths decides which lengths go into a row together. Which samples of a length go where is random,
    and so is the order of the samples in a row, so rows are random mixtures.

    Args:
        lengths: int[n], 1 to seq_length [tokens].
        seq_length: length of a row [tokens].
        rng: source of randomness.

    Raises:
        ValueError: a length is outside 1 to seq_length.
    """
    cells, patterns = _choose_patterns(lengths, seq_length)
    sizes = np.diff(patterns.borders)
    borders = np.concatenate([[0], np.cumsum(np.repeat(sizes, patterns.uses))])
    slots = _shuffled_slots(patterns, sizes, rng, cells.dtype)
    # Both sorts are stable, so the i-th slot of a length meets the i-th sample of that length in random order.
    shuffled = rng.permutation(len(cells))
    order = np.empty(len(cells), dtype=np.int64)
    order[np.argsort(slots, kind="stable")] = shuffled[np.argsort(cells[shuffled], kind="stable")]
    return PackedRows(order, borders)


def packed_utilisation(lengths: np.ndarray, seq_length: int, multiple: int = 1) -> float:
    """Return the fraction of positions that hold a token if samples are packed into rows of `seq_length`.

    Args:
        lengths: int[n], n > 0, each 1 to seq_length [tokens].
        seq_length: length of a row, a multiple of `multiple` [tokens].
        multiple: every sample starts at a multiple of it [tokens].

    Raises:
        ValueError: a length is outside 1 to seq_length.
    """
    _, patterns = _choose_patterns(-(-lengths // multiple), seq_length // multiple)
    return int(lengths.sum(dtype=np.int64)) / (patterns.num_rows * seq_length)


@functools.lru_cache(maxsize=2)
def _patterns_of(counts: bytes) -> RowPatterns:
    # Every epoch over the same samples has the same histogram.
    histogram = np.frombuffer(counts, dtype=np.int64)
    return find_patterns(histogram, len(histogram) - 1)


def _choose_patterns(lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, RowPatterns]:
    """Return the lengths in cells, rounded up so that samples that fit in cells fit in tokens, and their patterns."""
    if lengths.size and not 1 <= int(lengths.min()) <= int(lengths.max()) <= seq_length:
        raise ValueError(f"lengths reach from {lengths.min()} to {lengths.max()}, a row has 1 to {seq_length} tokens")
    tokens_per_cell = -(-seq_length // _MAX_CELLS)
    row = seq_length // tokens_per_cell
    # A sample that reaches into the last, incomplete cell is the only one in its row anyway.
    cells = np.minimum((lengths + (tokens_per_cell - 1)) // tokens_per_cell, row)
    # numpy sorts 16-bit integers by radix: ten times faster than a comparison sort.
    cells = cells.astype(np.uint16)
    return cells, _patterns_of(np.bincount(cells, minlength=row + 1).tobytes())


def _shuffled_slots(patterns: RowPatterns, sizes: np.ndarray, rng: np.random.Generator, dtype: Any) -> np.ndarray:
    """Return the length of every slot, row by row, with each row in a random order."""
    begin = np.concatenate([[0], np.cumsum(sizes * patterns.uses)])
    slots: np.ndarray = np.empty(begin[-1], dtype=dtype)
    for index, uses in enumerate(patterns.uses):
        row = patterns.lengths[patterns.borders[index] : patterns.borders[index + 1]]
        block = slots[begin[index] : begin[index + 1]].reshape(uses, len(row))
        block[:] = row
        if len(row) > 1:
            rng.permuted(block, axis=1, out=block)
    return slots
