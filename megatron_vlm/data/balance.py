"""Order rows so that every global batch, and every data-parallel rank's part of it, holds about the same work."""

import numpy as np


def order_rows(
    num_images: np.ndarray, work: np.ndarray, *, first_slot: int, global_batch_size: int, rng: np.random.Generator
) -> np.ndarray:
    """Return which row goes to each of the slots that follow `first_slot`.

    The rows are sorted by images, then by work, and cut into as many strata as a batch has slots; every batch takes
    one row of each stratum, at random. So batches are alike, and training still sees the rows in random order.

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
    strata = interleave_strata(global_batch_size)[(first_slot + slots) % global_batch_size]
    result = np.empty(rows, dtype=np.int64)
    result[slots[np.argsort(strata, kind="stable")]] = by_load
    return result


def interleave_strata(global_batch_size: int) -> np.ndarray:
    """Return the stratum of every position of a batch, so that the part of every rank is even.

    Rank r of dp takes the positions r, r + dp, r + 2 dp, ... Within blocks of 2, 4, 8, ... positions the order of the
    strata turns round from one block to the next (the inverse of the reflected Gray code), so for every power of two
    dp that divides the batch, low and high strata cancel in each rank's part.

    Returns:
        int64[global_batch_size]; a permutation.
    """
    block = global_batch_size & -global_batch_size
    positions = np.arange(global_batch_size)
    within = positions % block
    shift = 1
    while shift < block:
        within ^= within >> shift
        shift *= 2
    turned = (positions // block) % 2 == 1
    return positions // block * block + np.where(turned, block - 1 - within, within)
