"""Rectangular boxes of a tensor: what a checkpoint can store of a range of the flattened tensor."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor that is contiguous when the tensor is flattened."""

    begin: int
    """Place of its first element in the flattened tensor."""
    offsets: tuple[int, ...]
    """Index of its first element."""
    sizes: tuple[int, ...]

    @property
    def end(self) -> int:
        """Place after its last element in the flattened tensor."""
        return self.begin + prod(self.sizes)


def split_flat_range(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    """Yield the fewest boxes that together are elements `begin` to `end` of the flattened tensor, in their order.

    The rest of a first row, whole rows, and the start of a last row; a row of several dimensions is split likewise.
    For example, elements 3 to 14 of a [4, 5] tensor are [0, 3:5], [1:2, :] and [2, 0:4].

    Args:
        shape: of the tensor.
        begin: first element, 0 <= begin <= end.
        end: element after the last one, at most the product of `shape`.
    """
    if begin == end:
        return
    if len(shape) < 2:
        yield Box(begin, (begin,) * len(shape), (end - begin,) * len(shape))
        return
    row = prod(shape[1:])
    first_whole, last_whole = -(-begin // row), end // row
    if first_whole > last_whole:
        # The range lies inside one row.
        yield from _within_row(shape, last_whole, begin, end)
        return
    yield from _within_row(shape, first_whole - 1, begin, first_whole * row)
    if first_whole < last_whole:
        yield Box(
            first_whole * row,
            (first_whole, *(0 for _ in shape[1:])),
            (last_whole - first_whole, *shape[1:]),
        )
    yield from _within_row(shape, last_whole, last_whole * row, end)


def _within_row(shape: tuple[int, ...], index: int, begin: int, end: int) -> Iterator[Box]:
    """Split a range that lies inside the row `index`."""
    start = index * prod(shape[1:])
    for box in split_flat_range(shape[1:], begin - start, end - start):
        yield Box(start + box.begin, (index, *box.offsets), (1, *box.sizes))
