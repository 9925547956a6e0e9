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
    divides the batch, which need not be known.

    Args:
        num_images: int[batches * global_batch_size]; of the rows in their order so far.
        work: float[batches * global_batch_size].
        global_batch_size: rows of a batch.

    Returns:
        int64[batches * global_batch_size]; element i is the row that stands at i.
    """
    if not len(work):
        return np.empty(0, dtype=np.int64)
    loads = np.stack([num_images, work], axis=-1).astype(np.float64).reshape(-1, global_batch_size, 2)
    # Each batch by its own mean: a batch must not look at the others, which a longer training has more of.
    loads /= np.maximum(loads.mean(axis=1, keepdims=True), 1e-9)
    keys = loads[..., 0] + loads[..., 1] * (0.1 / np.maximum(loads[..., 1].max(axis=1, keepdims=True), 1.0))
    load, key = loads.reshape(-1, 2), keys.reshape(-1)
    groups = np.arange(len(work)).reshape(-1, 1, global_batch_size)
    while groups.shape[-1] % 2 == 0:
        halves = _split_evenly(groups.reshape(-1, groups.shape[-1]), load, key)
        # Group r of n holds the places r, r + n, r + 2 n, ...; its halves are the groups r and r + n of 2 n.
        shape = (-1, groups.shape[1], groups.shape[2] // 2)
        groups = np.concatenate([half.reshape(shape) for half in halves], axis=1)
    return groups.transpose(0, 2, 1).reshape(-1)


def _split_evenly(groups: np.ndarray, load: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split each group into two of the same size and nearly the same load.

    Rows of nearly the same load make a pair, one of which goes to each half; pairs that differ most are dealt first,
    each so that the difference so far shrinks.

    Args:
        groups: int64[groups, size]; rows, size even.
        load: float64[rows, 2]; each kind of load with mean 1.
        key: float64[rows]; rows of nearly the same key have nearly the same load.
    """
    ordered = np.take_along_axis(groups, np.argsort(key[groups], axis=1), axis=1)
    first, second = ordered[:, 0::2], ordered[:, 1::2]
    gap = load[first] - load[second]
    largest_first = np.argsort(-np.abs(gap).sum(axis=-1), axis=1)
    swap = np.zeros(first.shape, dtype=bool)
    difference = np.zeros((len(groups), 2))
    everyone = np.arange(len(groups))
    for pair in largest_first.T:
        step = gap[everyone, pair]
        swapped = (difference * step).sum(axis=-1) > 0
        difference += np.where(swapped[:, None], -step, step)
        swap[everyone, pair] = swapped
    return np.where(swap, second, first), np.where(swap, first, second)
