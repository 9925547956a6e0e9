"""Without packing: put samples of similar length in the same global batch, so that its rows can be short."""

import numpy as np

# Samples are sorted by length within random groups of this many batches, as in the length-grouped samplers of
# transformers and LLaVA: enough for batches of nearly equal lengths, while the batches of an epoch stay random.
_BATCHES_PER_GROUP = 50


def cluster_by_length(
    lengths: np.ndarray, *, first_slot: int, global_batch_size: int, rng: np.random.Generator
) -> np.ndarray:
    """Return samples in random batches of similar length.

    The batch already begun at `first_slot` and the incomplete one at the end take samples of any length.

    Args:
        lengths: int[n] [tokens].
        first_slot: rows already taken; row s belongs to batch s // global_batch_size.
        global_batch_size: rows of a batch.
        rng: source of randomness.

    Returns:
        int64[n]; element i is the sample of row first_slot + i.
    """
    shuffled = rng.permutation(len(lengths))
    head = min(-first_slot % global_batch_size, len(shuffled))
    num_batches = (len(shuffled) - head) // global_batch_size
    body = shuffled[head : head + num_batches * global_batch_size]
    group = np.arange(len(body)) // (_BATCHES_PER_GROUP * global_batch_size)
    batches = body[np.lexsort((lengths[body], group))].reshape(num_batches, global_batch_size)
    return np.concatenate([shuffled[:head], rng.permutation(batches).reshape(-1), shuffled[head + len(body) :]])


def clustered_row_lengths(lengths: np.ndarray, *, global_batch_size: int, multiple: int, seq_length: int) -> np.ndarray:
    """Return the length of the rows of each global batch, int32[batches]: its longest sample, rounded up.

    Args:
        lengths: int[rows]; of the one sample of each row [tokens].
        global_batch_size: rows of a batch; the last one may have fewer.
        multiple: lengths are rounded up to a multiple of it.
        seq_length: longest row; no sample is longer.
    """
    if not len(lengths):
        return np.empty(0, dtype=np.int32)
    longest = np.maximum.reduceat(lengths, np.arange(0, len(lengths), global_batch_size)).astype(np.int64)
    return np.minimum(-(-longest // multiple) * multiple, seq_length).astype(np.int32)
