"""Order rows so that every global batch, and every data-parallel rank's part of it, holds about the same work."""

import numpy as np


def deal_rows(
    num_images: np.ndarray, work: np.ndarray, *, first_slot: int, global_batch_size: int, rng: np.random.Generator
) -> np.ndarray:
    """Return which row goes to each of the slots that follow `first_slot`, so that batches are alike.

    The rows are sorted by images, then by work, and cut into as many strata as a batch has slots; every batch takes
    one row of each stratum, at random. So training still sees the rows in random order.

    Args:
        num_images: int[rows].
        work: float[rows]; attention work, the sum of squares of the sample lengths.
        first_slot: slots already taken; slot s is row s % global_batch_size of batch s // global_batch_size.
        global_batch_size: rows of a batch.
        rng: source of all randomness.

    Returns:
        int64[rows]; element i is the row of slot first_slot + i.
    """
    rows = len(work)
    # A random order first: the stable sorts below keep it among equals.
    by_load = rng.permutation(rows)
    by_load = by_load[np.lexsort((work[by_load], num_images[by_load]))]
    slots = rng.permutation(rows)
    strata = (first_slot + slots) % global_batch_size
    result = np.empty(rows, dtype=np.int64)
    result[slots[np.argsort(strata, kind="stable")]] = by_load
    return result


def balance_ranks(num_images: np.ndarray, work: np.ndarray, global_batch_size: int) -> np.ndarray:
    """Return an order of the rows of each batch in which every rank's part is even in images and in work.

    Rank r of dp has the rows r, r + dp, r + 2 dp, ... of a batch. A batch is split into two even halves, the rows at
    even and those at odd places, each half again, and so on: so the parts are even for every power of two dp that
    divides the batch, which need not be known. Where that ends with single rows, it is tried with pairs of rows, too,
    and each batch has what is more even.

    Args:
        num_images: int[batches * global_batch_size]; of the rows in their order so far.
        work: float[batches * global_batch_size].
        global_batch_size: rows of a batch.

    Returns:
        int64[batches * global_batch_size]; element i is the row that stands at i.
    """
    if not len(work):
        return np.empty(0, dtype=np.int64)
    load = np.stack([num_images, work], axis=-1).astype(np.float64).reshape(-1, global_batch_size, 2)
    # Each batch by its own mean: a batch must not look at the others, which a longer training has more of.
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
    """Return the load of the fullest rank of each batch, summed over all numbers of ranks and both kinds of load."""
    parts = load.reshape(-1, 2)[order]
    total = np.zeros(len(order))
    while parts.shape[1] > 2:
        parts = (parts[:, : parts.shape[1] // 2] + parts[:, parts.shape[1] // 2 :]) / 2
        total += parts.max(axis=1).sum(axis=-1)
    return total


def _pair_rows(num_images: np.ndarray, load: np.ndarray) -> np.ndarray:
    """Pair the rows of each batch: the largest load with the smallest, and no more images than an even share.

    Args:
        num_images: int[batches, size], size even.
        load: float64[batches, size, 2].

    Returns:
        int64[batches, size / 2, 2]; rows, counted over all batches.
    """
    batches, size = num_images.shape
    sums = load.sum(axis=2)
    share = np.ceil(2 * num_images.mean(axis=1, keepdims=True) - 1e-6)
    # Rows with more than half a share get partners of their own, of few enough images and of the load that is missing.
    rich = num_images > share / 2
    number = rich.sum(axis=1, keepdims=True)
    most = np.where(rich, num_images, 0).max(axis=1, keepdims=True)
    partner = num_images <= share - most
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
    """Return which member of each batch stands at each of its places, counted over all batches.

    Args:
        load: float64[batches, size, 2]; of each member, in images and in work, each with mean 1.

    Returns:
        int64[batches, size].
    """
    batches, size, _ = load.shape
    # Members of as many images, and of nearly the same work among those, have nearly the same key.
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

    Rows of nearly the same load make a pair, one of which goes to each half; pairs that differ most are dealt first,
    each so that the difference so far shrinks.

    Args:
        groups: int64[groups, size]; rows, size even, those of nearly the same load next to each other.
        load: float64[rows, 2]; each kind of load with mean 1.
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
