"""Choose which samples go into a row together if a row has two budgets: tokens and images.

Each kind of sample, a length and a number of images, is an item of two sizes. A row begins with the largest kind left
and takes the largest that still fits, again and again. Size is the sum of both fractions of the budgets; each is
weighted by how scarce the budget is over all samples, or both times by how much of it is left in the row as well, so
that samples of many images meet samples of much text. The way that needs fewer rows is taken.

Source: Panigrahy, Talwar, Uyeda and Wieder, Heuristics for vector bin packing, Microsoft Research (2011): "FFDSum" and
"dot product".
"""

import numpy as np

from megatron_vlm.data.plan.row_patterns import PatternCollector, RowPatterns


def find_kind_patterns(sizes: np.ndarray, counts: np.ndarray, budgets: tuple[int, int]) -> RowPatterns:
    """Choose patterns that use up all kinds of samples.

    Args:
        sizes: int64[kinds, 2]; tokens and images of each kind, each at most its budget.
        counts: int64[kinds]; samples of each kind, all > 0.
        budgets: tokens and images of a row.

    Returns:
        Patterns whose `lengths` are indices of kinds.
    """
    found = [_fill_rows(sizes, counts, budgets, by_room) for by_room in (False, True)]
    return min(found, key=lambda patterns: patterns.num_rows)


def _fill_rows(sizes: np.ndarray, counts: np.ndarray, budgets: tuple[int, int], by_room: bool) -> RowPatterns:
    weights = counts @ sizes / np.square(np.array(budgets, dtype=np.float64))
    weighted = sizes * (weights / weights.max())
    plain, collected = weighted @ (1 / np.array(budgets)), PatternCollector()
    left, names = counts.copy(), np.arange(len(counts))
    while names.size:
        pattern: dict[int, int] = {}
        room = np.array(budgets)
        fits = np.arange(len(names))
        while fits.size:
            worth = weighted[fits] @ (room / np.square(budgets, dtype=np.float64)) if by_room else plain[fits]
            kind = int(fits[worth.argmax()])
            number = min(int(left[kind]), int((room // np.maximum(sizes[kind], 1))[sizes[kind] > 0].min()))
            number = 1 if by_room else number
            pattern[kind] = pattern.get(kind, 0) + number
            room = room - number * sizes[kind]
            fits = fits[(sizes[fits] <= room).all(axis=1)]
            if pattern[kind] == left[kind]:
                fits = fits[fits != kind]
        times = min(int(left[kind]) // number for kind, number in pattern.items())
        for kind, number in pattern.items():
            left[kind] -= number * times
        collected.add({int(names[kind]): number for kind, number in pattern.items()}, times)
        if not all(left[kind] for kind in pattern):
            kept = left > 0
            left, names, sizes, weighted, plain = left[kept], names[kept], sizes[kept], weighted[kept], plain[kept]
    return collected.patterns()
