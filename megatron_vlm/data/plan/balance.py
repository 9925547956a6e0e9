"""Order rows so that all global batches, and all data-parallel ranks within one, have about the same work."""

import numpy as np


def deal_rows(
    num_images: np.ndarray, work: np.ndarray, *, first_slot: int, global_batch_size: int, rng: np.random.Generator
) -> np.ndarray:
    """Return which row goes to each of the slots from `first_slot` on, so that batches are alike.

    The rows are sorted by images, then by work, and cut into as many strata as a batch has slots; every batch takes
    one row of each stratum, at random. So training still sees rows in random order.

    Args:
        num_images: int[rows].
        work: float[rows]; attention work, the sum of squares of the sample lengths.
        first_slot: slots already taken; slot s is row s % global_batch_size of batch s // global_batch_size.
        global_batch_size: rows of a batch.
        rng: source of randomness.

    Returns:
        int64[rows]; element i is the row of slot first_slot + i.
    """
    rows = len(work)
    # A random order first, which the stable sorts below keep among equals.
    by_load = rng.permutation(rows)
    by_load = by_load[np.lexsort((work[by_load], num_images[by_load]))]
    slots = rng.permutation(rows)
    strata = (first_slot + slots) % global_batch_size
    result = np.empty(rows, dtype=np.int64)
    result[slots[np.argsort(strata, kind="stable")]] = by_load
    return result


def balance_ranks(num_images: np.ndarray, work: np.ndarray, global_batch_size: int) -> np.ndarray:
    """Return an order of the rows of each batch in which all ranks have even numbers of images and even work.

    Rank r of dp has the rows r, r + dp, r + 2 dp, ... of a batch. A batch is split into two even halves, the rows at
    even and those at odd places, each half is split again, and so on. So ranks are even for every power of two dp that
    divides the batch, and dp need not be known. If splitting ends with single rows, pairs of rows are tried as well,
    and each batch takes the more even result.

    Args:
        num_images: int[batches * global_batch_size]; of the rows in their present order.
        work: float[batches * global_batch_size].
        global_batch_size: rows of a batch.

    Returns:
        int64[batches * global_batch_size]; element i is the row that goes to place i.
    """
    if not len(work):
        return np.empty(0, dtype=np.int64)
    load = np.stack([num_images, work], axis=-1).astype(np.float64).reshape(-1, global_batch_size, 2)
    # Relative to the mean of its own batch: a longer training has more batches, and must not change this one.
    load /= np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
    order = _place_evenly(load)
    if global_batch_size & (global_batch_size - 1) == 0 and global_batch_size > 2:
        pairs = _pair_rows(num_images.reshape(-1, global_batch_size), load)
        places = _place_evenly(load.reshape(-1, 2)[pairs].mean(axis=2))
        of_pairs = pairs.reshape(-1, 2)[places].transpose(0, 2, 1).reshape(order.shape)
        better = _waiting(load, of_pairs) < _waiting(load, order)
        order = np.where(better[:, None], of_pairs, order)
    return order.reshape(-1)


def _waiting(load: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return the load of each batch's fullest rank, summed over all numbers of ranks and both kinds of load."""
    parts = load.reshape(-1, 2)[order]
    total = np.zeros(len(order))
    while parts.shape[1] > 2:
        parts = (parts[:, : parts.shape[1] // 2] + parts[:, parts.shape[1] // 2 :]) / 2
        total += parts.max(axis=1).sum(axis=-1)
    return total


def _pair_rows(num_images: np.ndarray, load: np.ndarray) -> np.ndarray:
    """Pair the rows of each batch: the largest load with the smallest, without exceeding an even number of images.

    Args:
        num_images: int[batches, size], size even.
        load: float64[batches, size, 2].

    Returns:
        int64[batches, size / 2, 2]; rows, numbered over all batches.
    """
    batches, size = num_images.shape
    sums = load.sum(axis=2)
    even = np.ceil(2 * num_images.mean(axis=1, keepdims=True) - 1e-6)
    # Rows with more than half of that get partners with few enough images and the load that is missing.
    rich = num_images > even / 2
    number = rich.sum(axis=1, keepdims=True)
    most = np.where(rich, num_images, 0).max(axis=1, keepdims=True)
    partner = num_images <= even - most
    missing = 2 * sums.mean(axis=1, keepdims=True) - (sums * rich).sum(axis=1, keepdims=True) / np.maximum(number, 1)
    best_first = np.argsort(np.where(partner, np.abs(sums - missing), np.inf), axis=1, kind="stable")
    rank = np.empty((batches, size), dtype=np.int64)
    np.put_along_axis(rank, best_first, np.arange(size)[None], axis=1)
    partner &= rank < number
    span = sums.max(axis=1, keepdims=True) + 1
    order = np.argsort(sums + span * (partner.astype(np.int64) - rich), axis=1, kind="stable")
    order += np.arange(batches)[:, None] * size
    return np.stack([order[:, : size // 2], order[:, : size // 2 - 1 : -1]], axis=-1)


def _place_evenly(load: np.ndarray) -> np.ndarray:
    """Return which member of each batch goes to each of its places, numbered over all batches.

    Args:
        load: float64[batches, size, 2]; images and work of each member, each with mean 1.

    Returns:
        int64[batches, size].
    """
    batches, size, _ = load.shape
    # Members with the same number of images, and among these with similar work, have similar keys.
    keys = load[..., 0] + load[..., 1] * (0.1 / np.maximum(load[..., 1].max(axis=1, keepdims=True), 1.0))
    groups = (np.argsort(keys, axis=1, kind="stable") + np.arange(batches)[:, None] * size)[:, None]
    flat = load.reshape(-1, 2)
    while groups.shape[-1] % 2 == 0:
        halves = _split_evenly(groups.reshape(-1, groups.shape[-1]), flat)
        # Group r of n holds the places r, r + n, r + 2 n, ...; its halves are the groups r and r + n of 2 n.
        shape = (-1, groups.shape[1], groups.shape[2] // 2)
        groups = np.concatenate([half.reshape(shape) for half in halves], axis=1)
    return groups.transpose(0, 2, 1).reshape(batches, size)


def _split_evenly(groups: np.ndarray, load: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split each group into two of the same size and nearly the same load, both in the order of the group.

    Two rows of nearly the same load form a pair, and one of them goes to each half. Pairs that differ most are dealt
    first, each in the way that reduces the difference so far.

    Args:
        groups: int64[groups, size]; rows, with those of similar load next to each other; size is even.
        load: float64[rows, 2]; images and work, each with mean 1.
    """
    first, second = groups[:, 0::2], groups[:, 1::2]
    gap = load[first] - load[second]
    largest_first = np.argsort(-np.abs(gap).sum(axis=-1), axis=1, kind="stable")
    swap = np.zeros(first.shape, dtype=bool)
    difference = np.zeros((len(groups), 2))
    everyone = np.arange(len(groups))
    for pair in largest_first.T:
        step = gap[everyone, pair]
        swapped = (difference * step).sum(axis=-1) > 0
        difference += np.where(swapped[:, None], -step, step)
        swap[everyone, pair] = swapped
    return np.where(swap, second, first), np.where(swap, first, second)
