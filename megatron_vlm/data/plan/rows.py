"""Put the samples of one pass after the other into rows, and the rows into global batches."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_vlm.data.plan.balance import deal_rows
from megatron_vlm.data.plan.clustering import cluster_by_length
from megatron_vlm.data.plan.packing import ImageBudget, pack_samples
from megatron_vlm.data.plan.sample_pool import SamplePool
from megatron_vlm.data.plan.settings import PlanSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Where a part of a plan ends, whichever comes first; both None: nowhere."""

    iteration: int | None = None
    """After so many global batches."""
    tokens: int | None = None
    """After the first global batch that ends with so many tokens or more, counted from the first of all."""


class RowsSoFar:
    """The rows of a plan, as they grow.

    Args:
        settings: of the plan.
        pool: its samples.
    """

    def __init__(self, settings: PlanSettings, pool: SamplePool) -> None:
        self.settings, self.pool = settings, pool
        self._kind: Any = np.uint32 if len(pool.lengths) <= np.iinfo(np.uint32).max else np.int64
        self._samples, self._sizes = [np.empty(0, dtype=self._kind)], [np.empty(0, dtype=np.int64)]
        self.num_rows = self.num_tokens = 0
        self.num_passes = 0
        """Passes over the blend, including one that is not finished."""
        self.stable_rows = 0
        """Leading rows that every longer training over the same data shares."""

    @property
    def num_iterations(self) -> int:
        """Full global batches."""
        return self.num_rows // self.settings.global_batch_size

    def has_reached(self, end: End) -> bool:
        """Return whether this is the end, or that of the training as `train_iters` sets it."""
        limit = self._limit(end)
        if limit is not None and limit <= 0:
            return True
        is_full = self.num_rows % self.settings.global_batch_size == 0
        return end.tokens is not None and is_full and self.num_tokens >= end.tokens

    def add(self, samples: np.ndarray, rng: np.random.Generator, end: End) -> np.ndarray:
        """Add the rows of a pass, or its first ones up to the end.

        Args:
            samples: int64[n]; global ids of the pass.
            rng: source of randomness.
            end: where the rows stop.

        Returns:
            The ids of the samples in these rows.
        """
        found, borders = _rows_of_pass(self.settings, self.pool, samples, self.num_rows, self._limit(end), rng)
        if end.tokens is not None and len(found):
            borders = borders[: self._rows_to(end.tokens, found, borders) + 1]
            found = found[: borders[-1]]
        self._samples.append(found.astype(self._kind))
        self._sizes.append(np.diff(borders))
        self.num_rows += len(borders) - 1
        self.num_tokens += int(self.pool.lengths[found].sum(dtype=np.int64))
        return found

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all samples, row by row, and the borders of the rows."""
        sizes = np.concatenate(self._sizes)
        return np.concatenate(self._samples), np.concatenate([[0], np.cumsum(sizes)])

    def _limit(self, end: End) -> int | None:
        """Return how many rows may follow; None: any number."""
        iterations = [number for number in (self.settings.train_iters, end.iteration) if number is not None]
        return min(iterations) * self.settings.global_batch_size - self.num_rows if iterations else None

    def _rows_to(self, tokens: int, samples: np.ndarray, borders: np.ndarray) -> int:
        """Return how many of these rows there are up to the end of the batch in which the tokens are reached."""
        of_rows = np.add.reduceat(self.pool.lengths[samples].astype(np.int64), borders[:-1])
        numbers = self.num_rows + np.arange(1, len(borders))
        is_end = (numbers % self.settings.global_batch_size == 0) & (self.num_tokens + np.cumsum(of_rows) >= tokens)
        return int(is_end.argmax()) + 1 if is_end.any() else len(is_end)


def _rows_of_pass(
    settings: PlanSettings,
    pool: SamplePool,
    samples: np.ndarray,
    first_slot: int,
    limit: int | None,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples of a pass, row by row, and the borders of the rows."""
    if settings.length_clustering:
        order = cluster_by_length(
            pool.lengths[samples], first_slot=first_slot, global_batch_size=settings.global_batch_size, rng=rng
        )
        samples = samples[order[:limit]]
        return samples, np.arange(len(samples) + 1)
    if settings.packing:
        # Counted in multiples: a sample fills up its last one.
        multiple = settings.sample_multiple
        lengths = pool.lengths[samples] if multiple == 1 else -(-pool.lengths[samples] // multiple)
        most = settings.max_images_per_row
        budget = None if most is None else ImageBudget(pool.num_images[samples], most)
        packed = pack_samples(lengths, settings.seq_length // multiple, rng, budget)
        samples, borders = samples[packed.order], packed.borders
    else:
        borders = np.arange(len(samples) + 1)
    if not len(samples):
        return samples, borders
    images, work = row_loads(pool, samples, borders)
    rows = deal_rows(images, work, first_slot=first_slot, global_batch_size=settings.global_batch_size, rng=rng)
    return take_rows(samples, borders, rows[:limit])


def row_loads(pool: SamplePool, ids: np.ndarray, borders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and the attention work (the sum of squared sample lengths) of each row.

    Args:
        pool: all samples by id.
        ids: int[n]; samples, row by row.
        borders: int64[rows + 1]; no row is empty.
    """
    images = np.add.reduceat(pool.num_images[ids], borders[:-1])
    return images, np.add.reduceat(np.square(pool.lengths[ids], dtype=np.float64), borders[:-1])


def take_rows(ids: np.ndarray, borders: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples of the chosen rows, in this order, and the borders of the rows."""
    sizes = np.diff(borders)[rows]
    new_borders = np.concatenate([[0], np.cumsum(sizes)])
    source = np.arange(new_borders[-1]) + np.repeat(borders[:-1][rows] - new_borders[:-1], sizes)
    return ids[source], new_borders
