"""Pack whole samples into rows of a fixed length."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_vlm.data.plan.row_patterns import RowPatterns, find_patterns
from megatron_vlm.data.plan.two_budgets import find_kind_patterns

# Longer rows are measured in cells of several tokens, because the search for patterns costs cells x lengths.
_MAX_CELLS = 8192
# Spare images of the rows opened for the excess of others, over that excess. Neither is better for all data.
_ROOM_FOR_EXCESS = (1, 2)


@dataclass(frozen=True, slots=True)
class ImageBudget:
    """The images of some samples, and how many a row may have."""

    of_samples: np.ndarray
    """int[n]."""
    per_row: int


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Samples in rows."""

    order: np.ndarray
    """int64[n]; positions of the samples, row by row."""
    borders: np.ndarray
    """int64[rows + 1]; row i is order[borders[i] : borders[i + 1]]."""


def pack_samples(
    lengths: np.ndarray, seq_length: int, rng: np.random.Generator, images: ImageBudget | None = None
) -> PackedRows:
    """Put every sample into exactly one row.

    The histogram of lengths decides which lengths go into a row together. Which samples of a length go where is random,
    and so is the order of the samples in a row, so rows are random mixtures.

    With a budget of images, the rows are formed as without it. Those with too many images are opened, and with them as
    many of those with the fewest images as have room for the excess, or for twice the excess. Their samples are packed
    again under both budgets, and the way that needs fewer rows is taken.

    Args:
        lengths: int[n], 1 to seq_length [tokens].
        seq_length: length of a row [tokens].
        rng: source of randomness.
        images: the images of the samples, and how many a row may have; None: any number.

    Raises:
        ValueError: a length is outside 1 to seq_length, or a sample has more images than a row may have.
    """
    cells, row, patterns = _choose_patterns(lengths, seq_length)
    packed = _place(cells, patterns, rng)
    return packed if images is None or not len(cells) else _hold_images(packed, cells, row, images, rng)


def _place(kinds: np.ndarray, patterns: RowPatterns, rng: np.random.Generator) -> PackedRows:
    """Put samples into the rows of patterns of their kinds."""
    sizes = np.diff(patterns.borders)
    borders = np.concatenate([[0], np.cumsum(np.repeat(sizes, patterns.uses))])
    slots = _shuffled_slots(patterns, sizes, rng, kinds.dtype)
    # Both sorts are stable, so the i-th slot of a kind meets the i-th sample of that kind in random order.
    shuffled = rng.permutation(len(kinds))
    order = np.empty(len(kinds), dtype=np.int64)
    order[np.argsort(slots, kind="stable")] = shuffled[np.argsort(kinds[shuffled], kind="stable")]
    return PackedRows(order, borders)


def _hold_images(
    packed: PackedRows, cells: np.ndarray, row: int, images: ImageBudget, rng: np.random.Generator
) -> PackedRows:
    """Pack the samples of rows with too many images again, with those of rows with few; other rows stay."""
    if int(images.of_samples.max()) > images.per_row:
        raise ValueError(f"a sample has {images.of_samples.max()} images, a row has at most {images.per_row}")
    spare = images.per_row - np.add.reduceat(images.of_samples[packed.order].astype(np.int64), packed.borders[:-1])
    if spare.min() >= 0:
        return packed
    base = int(images.of_samples.max()) + 1
    codes, sizes = cells.astype(np.int64) * base + images.of_samples, np.diff(packed.borders)
    found = []
    for times in _ROOM_FOR_EXCESS:
        opened = _rows_to_open(spare, times)
        counts = np.bincount(codes[packed.order[np.repeat(opened, sizes)]])
        kinds = np.flatnonzero(counts)
        patterns = find_kind_patterns(np.stack(np.divmod(kinds, base), axis=1), counts[kinds], (row, images.per_row))
        found.append((opened, kinds, patterns))
    opened, kinds, patterns = min(found, key=lambda one: one[2].num_rows - int(one[0].sum()))
    is_opened = np.repeat(opened, sizes)
    again = packed.order[is_opened]
    kind_of_code = np.zeros(kinds[-1] + 1, dtype=np.int64)
    kind_of_code[kinds] = np.arange(len(kinds))
    repacked = _place(kind_of_code[codes[again]], patterns, rng)
    return PackedRows(
        np.concatenate([packed.order[~is_opened], again[repacked.order]]),
        np.concatenate([[0], np.cumsum(np.concatenate([sizes[~opened], np.diff(repacked.borders)]))]),
    )


def _rows_to_open(spare: np.ndarray, times: int) -> np.ndarray:
    """Return which rows have too many images, and those of most spare images, until these are `times` the excess."""
    opened = spare < 0
    most_first = np.argsort(-spare, kind="stable")
    room = np.cumsum(np.maximum(spare[most_first], 0))
    opened[most_first[: np.searchsorted(room, -times * spare[opened].sum()) + 1]] = True
    return opened


def packed_utilisation(
    lengths: np.ndarray, seq_length: int, multiple: int = 1, images: ImageBudget | None = None
) -> float:
    """Return the fraction of positions that hold a token if samples are packed into rows of `seq_length`.

    Args:
        lengths: int[n], n > 0, each 1 to seq_length [tokens].
        seq_length: length of a row, a multiple of `multiple` [tokens].
        multiple: every sample starts at a multiple of it [tokens].
        images: as in `pack_samples`.

    Raises:
        ValueError: as `pack_samples`.
    """
    multiples, row = -(-lengths // multiple), seq_length // multiple
    if images is None:
        num_rows = _choose_patterns(multiples, row)[2].num_rows
    else:
        num_rows = len(pack_samples(multiples, row, np.random.default_rng(0), images).borders) - 1
    return int(lengths.sum(dtype=np.int64)) / (num_rows * seq_length)


@functools.lru_cache(maxsize=2)
def _patterns_of(counts: bytes) -> RowPatterns:
    # Every epoch over the same samples has the same histogram.
    histogram = np.frombuffer(counts, dtype=np.int64)
    return find_patterns(histogram, len(histogram) - 1)


def _choose_patterns(lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, int, RowPatterns]:
    """Return the lengths in cells, rounded up so that what fits in cells fits in tokens; the row; the patterns."""
    if lengths.size and not 1 <= int(lengths.min()) <= int(lengths.max()) <= seq_length:
        raise ValueError(f"lengths reach from {lengths.min()} to {lengths.max()}, a row has 1 to {seq_length} tokens")
    tokens_per_cell = -(-seq_length // _MAX_CELLS)
    row = seq_length // tokens_per_cell
    # A sample that reaches into the last, incomplete cell is the only one in its row anyway.
    cells = np.minimum((lengths + (tokens_per_cell - 1)) // tokens_per_cell, row)
    # numpy sorts 16-bit integers by radix: ten times faster than a comparison sort.
    cells = cells.astype(np.uint16)
    return cells, row, _patterns_of(np.bincount(cells, minlength=row + 1).tobytes())


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
