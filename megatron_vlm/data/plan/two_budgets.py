"""Choose which samples go into a row together if a row has two budgets: tokens and images.

Each kind of sample is a length and a number of images. A row begins with the longest kind left and takes the longest
that fits, again and again, as with one budget. But every row must take its share of the images: as many as a full row
of the samples that are left has on average, or its budget if that is less. So a kind is taken only if the tokens that
remain after it suffice for the images that the row still lacks. Otherwise documents of much text would fill rows
together, and later rows, of image-text pairs alone, would have no images left to fill their tokens with.
"""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from megatron_vlm.data.plan.row_patterns import PatternCollector, RowPatterns


def find_kind_patterns(sizes: np.ndarray, counts: np.ndarray, budgets: tuple[int, int]) -> RowPatterns:
    """Choose patterns that use up all kinds of samples.

    Args:
        sizes: int64[kinds, 2]; tokens and images of each kind, each at most its budget; ascending by tokens.
        counts: int64[kinds]; samples of each kind, all > 0.
        budgets: tokens and images of a row.

    Returns:
        Patterns whose `lengths` are indices of kinds.
    """
    search, collected = _RowSearch(sizes, counts), PatternCollector()
    while search.groups:
        pattern = search.fill_row(*budgets)
        collected.add(pattern, search.take(pattern))
    return collected.patterns()


@dataclass(slots=True)
class _Group:
    """The kinds with the same number of images that have samples left."""

    images: int
    lengths: list[int]
    """Ascending [tokens]."""
    kinds: list[int]
    """In the same order."""
    tokens_per_image: float
    """Over all samples of the group, infinite without images."""


class _RowSearch:
    """The samples that are left, and how a row is filled from them."""

    def __init__(self, sizes: np.ndarray, counts: np.ndarray) -> None:
        self.sizes: list[tuple[int, int]] = [(length, images) for length, images in sizes.tolist()]
        self.left: list[int] = counts.tolist()
        self.tokens, self.images = (int(total) for total in counts @ sizes)
        self.groups: list[_Group] = []
        for images in np.unique(sizes[:, 1]):
            kinds = np.flatnonzero(sizes[:, 1] == images)
            tokens, number = int(counts[kinds] @ sizes[kinds, 0]), int(counts[kinds].sum() * images)
            per_image = tokens / number if number else float("inf")
            self.groups.append(_Group(int(images), sizes[kinds, 0].tolist(), kinds.tolist(), per_image))
        self.groups.sort(key=lambda group: group.tokens_per_image)

    def fill_row(self, row: int, most_images: int) -> dict[int, int]:
        """Return how many samples of each kind form the next row of `row` tokens."""
        lacking = min(most_images, self.images / self.tokens * row)
        gap, room, pattern = row, most_images, dict[int, int]()
        while (kind := self._choose(gap, room, lacking, pattern)) is not None:
            pattern[kind] = pattern.get(kind, 0) + 1
            length, images = self.sizes[kind]
            gap, room, lacking = gap - length, room - images, lacking - images
        return pattern

    def take(self, pattern: dict[int, int]) -> int:
        """Remove the samples of a pattern as often as there are enough, and return how often."""
        times = min(self.left[kind] // number for kind, number in pattern.items())
        for kind, number in pattern.items():
            length, images = self.sizes[kind]
            self.left[kind] -= number * times
            self.tokens -= number * times * length
            self.images -= number * times * images
            if not self.left[kind]:
                (group,) = (group for group in self.groups if group.images == images)
                position = bisect_right(group.lengths, length) - 1
                del group.lengths[position], group.kinds[position]
        self.groups = [group for group in self.groups if group.kinds]
        return times

    def _choose(self, gap: int, room: int, lacking: float, pattern: dict[int, int]) -> int | None:
        """Return the longest kind after which the row can still get the images it lacks; None: none fits.

        If there is no such kind, it is the longest that fits of those with the fewest tokens per image.
        """
        per_image = self.groups[0].tokens_per_image
        best, longest = None, 0
        for group in self.groups:
            if group.images > room:
                continue
            still = max(0.0, lacking - group.images)
            kind = self._longest(group, gap - still * per_image if still else gap, pattern)
            if kind is not None and self.sizes[kind][0] > longest:
                best, longest = kind, self.sizes[kind][0]
        if best is not None:
            return best
        fitting = (self._longest(group, gap, pattern) for group in self.groups if group.images <= room)
        return next((kind for kind in fitting if kind is not None), None)

    def _longest(self, group: _Group, most: float, pattern: dict[int, int]) -> int | None:
        """Return the longest kind of a group, of at most `most` tokens, that has samples left beside the pattern."""
        position = bisect_right(group.lengths, most) - 1
        while position >= 0 and pattern.get(group.kinds[position], 0) == self.left[group.kinds[position]]:
            position -= 1
        return group.kinds[position] if position >= 0 else None
