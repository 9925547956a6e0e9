"""How evenly a plan spreads images and attention work over data-parallel ranks, compared with random order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vlm.config import UsageError
from megatron_vlm.data.plan.compute import PlannedRows
from megatron_vlm.data.plan.rows import row_loads
from megatron_vlm.data.plan.settings import PlanSettings

_LOADS = ("images", "attention work")


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """One kind of load at one number of data-parallel ranks.

    All figures except `worst` and `random_worst` are the load of the fullest rank in each global batch, summed over all
    batches, divided by the mean over all ranks: how much longer a run takes because ranks wait for each other.
    """

    data_parallel_size: int
    load: str
    planned: float
    random: float
    """The same rows in random order."""
    lower_bound: float
    """A lower bound for any order of the rows within these batches: at best, large rows are paired with small ones."""
    worst: float
    """Load of the fullest rank in the worst batch, divided by the mean of that batch."""
    random_worst: float


def check_sizes(data_parallel_sizes: Sequence[int], global_batch_size: int) -> None:
    """Check that every number of ranks divides the global batch.

    Raises:
        UsageError: one does not.
    """
    for size in data_parallel_sizes:
        if size < 1 or global_batch_size % size:
            what = f"{size} data-parallel ranks do not share training.global_batch_size={global_batch_size} evenly"
            raise UsageError(what, fix="give numbers that divide it")


def report_balance(settings: PlanSettings, rows: PlannedRows, data_parallel_sizes: Sequence[int]) -> list[Balance]:
    """Simulate which rank gets which rows, for several numbers of ranks; incomplete global batches are ignored.

    Raises:
        UsageError: a size does not divide the global batch, or no global batch is complete.
    """
    batch = settings.global_batch_size
    check_sizes(data_parallel_sizes, batch)
    num_batches = (len(rows.row_borders) - 1) // batch
    if not num_batches:
        what = f"{len(rows.row_borders) - 1} rows do not fill a global batch of {batch}"
        raise UsageError(what, fix="plan a longer training")
    rng = np.random.default_rng(settings.seed)
    order = rng.permutation(num_batches * batch)
    if settings.length_clustering:
        # Clustering decides which rows are in a batch; only their order within it is random.
        order = rng.permuted(np.arange(num_batches * batch).reshape(num_batches, batch), axis=1).reshape(-1)
    result = []
    for name, load in zip(_LOADS, row_loads(rows.pool, rows.sample_ids, rows.row_borders), strict=True):
        planned = load[: len(order)].astype(np.float64)
        shuffled = planned[order].reshape(num_batches, batch)
        planned = planned.reshape(num_batches, batch)
        result += [_compare(size, name, planned, shuffled) for size in data_parallel_sizes]
    return sorted(result, key=lambda balance: balance.data_parallel_size)


def _compare(size: int, name: str, planned: np.ndarray, shuffled: np.ndarray) -> Balance:
    mean = np.maximum(planned.sum(axis=1) / size, 1e-9)
    least = _least_fullest(planned, size)
    if name == "images":
        least = np.ceil(least - 1e-6)
    fullest, random_fullest = _fullest(planned, size), _fullest(shuffled, size)
    random_mean = np.maximum(shuffled.sum(axis=1) / size, 1e-9)
    return Balance(
        data_parallel_size=size,
        load=name,
        planned=float(fullest.sum() / mean.sum()),
        random=float(random_fullest.sum() / mean.sum()),
        lower_bound=float(least.sum() / mean.sum()),
        worst=float((fullest / mean).max()),
        random_worst=float((random_fullest / random_mean).max()),
    )


def _least_fullest(load: np.ndarray, size: int) -> np.ndarray:
    """Return a lower bound for the fullest rank of each batch over all orders of its rows."""
    rows_per_rank = load.shape[1] // size
    ascending = np.sort(load, axis=1)
    descending = ascending[:, ::-1][:, :size]
    if rows_per_rank == 2:
        # No pairing is more even than the largest with the smallest, the second largest with the second smallest, ...
        return (descending + ascending[:, :size]).max(axis=1)
    # The n largest rows are on at most n ranks, which at best are filled up with the smallest rows.
    numbers = np.arange(1, size + 1)
    smallest = np.concatenate([np.zeros((len(load), 1)), np.cumsum(ascending, axis=1)], axis=1)
    return ((np.cumsum(descending, axis=1) + smallest[:, numbers * (rows_per_rank - 1)]) / numbers).max(axis=1)


def _fullest(load: np.ndarray, size: int) -> np.ndarray:
    """Return the load of the fullest rank of each batch; row j of a batch goes to rank j % size."""
    return load.reshape(len(load), -1, size).sum(axis=1).max(axis=1)
