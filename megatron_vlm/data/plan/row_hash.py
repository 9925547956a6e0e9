"""A hash of the samples of a global batch that ranks can compute in parts and add up."""

import hashlib
from collections.abc import Sequence

import numpy as np

HASH_BITS = 64
# Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators" (SplitMix64), OOPSLA 2014.
_STEP, _FIRST, _SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def hash_rows(sample_ids: np.ndarray, samples_per_row: np.ndarray, rows: Sequence[int]) -> int:
    """Hash which sample stands at which place of which row.

    The hash of a global batch is the sum modulo 2^64 of the hashes of its parts, however its rows are cut into parts:
    a wrong, missing or doubled sample, samples in another order and exchanged rows all change it.

    Args:
        sample_ids: int64[n]; row after row.
        samples_per_row: int64[len(rows)]; sums to n.
        rows: index of each row in its global batch.

    Returns:
        An integer below 2^64; 0 where there are no samples.
    """
    ends = np.cumsum(samples_per_row)
    places = np.arange(len(sample_ids)) - np.repeat(ends - samples_per_row, samples_per_row)
    mixed = _mix(np.repeat(np.asarray(rows, dtype=np.uint64), samples_per_row))
    mixed = _mix(mixed + places.astype(np.uint64))
    mixed = _mix(mixed + sample_ids.astype(np.uint64))
    return int(mixed.sum(dtype=np.uint64))


def chain_hash(before: str, batch: int) -> str:
    """Return a hash of all global batches so far.

    Args:
        before: that of all but the last one; empty if there are no others.
        batch: hash of the last one.
    """
    return hashlib.sha256(f"{before} {batch:016x}".encode()).hexdigest()[:16]


def _mix(values: np.ndarray) -> np.ndarray:
    """Map uint64 one to one to uint64 that look random; overflow wraps, as it is meant to."""
    values = values + _STEP
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))
