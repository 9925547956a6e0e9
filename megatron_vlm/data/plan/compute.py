"""Compute the plan of a training run: epochs of a blend, packed into rows, in evenly loaded global batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vlm.data.plan.balance import balance_ranks
from megatron_vlm.data.plan.clustering import clustered_row_lengths
from megatron_vlm.data.plan.rows import RowsSoFar, row_loads, take_rows
from megatron_vlm.data.plan.sample_lengths import SampleLengths
from megatron_vlm.data.plan.sample_pool import SamplePool, collect_samples
from megatron_vlm.data.plan.settings import PlanSettings
from megatron_vlm.data.plan.steps import add_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSummary:
    """What a plan holds; counts are over the whole training unless they refer to the datasets."""

    hash: str
    num_rows: int
    """Rows that hold samples; the rest of the last batch is empty."""
    num_iterations: int
    num_samples: int
    num_tokens: int
    """Tokens of all rows, without padding."""
    num_images: int
    num_passes: int
    """Passes over the blend, including one that is not finished."""
    truncated: int
    """Samples of the datasets that are cut off because they are longer than a row."""
    dropped: int
    """Samples of the datasets that are left out for that reason."""
    utilisation: float
    """Fraction of the positions in the rows that hold a token."""
    split: int = 0
    """Samples of the datasets that are split into fragments for that reason."""
    first_fragment_id: int = 0
    """Number of samples in the datasets of the first step; the ids from here on belong to the second and later
    fragments of split samples."""
    fewest_image_tokens: int = 0
    """Fewest tokens of an image in the datasets; 0 if there are no images and the number is not constant."""
    most_image_tokens: int = 0
    """Most tokens of an image in the datasets."""
    stable_iterations: int = 0
    """Leading global batches that every longer training over the same data shares."""
    later_samples: Sequence[tuple[int, int]] = ()
    """Begin and end of the ids of the samples of datasets that later steps of the blend add, a range for each such
    step; their fragments follow behind them."""
    step_iterations: Sequence[int] = ()
    """Iterations before each step of the blend after the first, of those that begin."""
    nothing_to_train: Sequence[int] = ()
    """For each dataset, samples (with overflow "split": fragments) that are left out because their part in a row has no
    token with a loss. Empty in plans of versions that kept them."""


@dataclass(frozen=True, slots=True)
class PlannedRows:
    """A plan, computed but not saved."""

    sample_ids: np.ndarray
    """uint32 or int64[samples]; row by row."""
    row_borders: np.ndarray
    """int64[rows + 1]."""
    seq_lengths: np.ndarray | None
    """int32[iterations]; length of the rows of each global batch [tokens]; None if it is always `seq_length`."""
    pool: SamplePool
    summary: PlanSummary


def plan_rows(settings: PlanSettings, datasets: Sequence[SampleLengths]) -> PlannedRows:
    """Compute a plan without saving it.

    The plan of a longer training over the same datasets begins with the same `stable_iterations` global batches: all of
    them if the length is given as train_iters, those of complete passes if it is given as train_epochs. And a plan that
    only adds later steps to the blend begins with the batches before them.

    Raises:
        ConfigError: the blend cannot be made from these datasets, or a pass over it has too few samples.
        DataError: with overflow "fail", a sample is longer than a row or has too many images; with "split", an image is
            longer than a row.
    """
    pool = collect_samples(
        settings.blend,
        datasets,
        seq_length=settings.seq_length,
        image_tokens=settings.image_tokens,
        overflow=settings.overflow,
        max_images=settings.max_images_per_row,
    )
    made = RowsSoFar(settings, pool)
    step_iterations = add_steps(made)
    ids, borders = made.arrays()
    ids, borders = _balance(settings, pool, ids, borders)
    seq_lengths = None
    if settings.length_clustering:
        seq_lengths = clustered_row_lengths(
            pool.lengths[ids],
            global_batch_size=settings.global_batch_size,
            multiple=settings.length_multiple,
            seq_length=settings.seq_length,
        )
    summary = _summarise(made, ids, seq_lengths, step_iterations)
    return PlannedRows(ids, borders, seq_lengths, pool, summary)


def _summarise(
    made: RowsSoFar, ids: np.ndarray, seq_lengths: np.ndarray | None, step_iterations: tuple[int, ...]
) -> PlanSummary:
    settings, pool, num_rows = made.settings, made.pool, made.num_rows
    num_tokens, batch = int(pool.lengths[ids].sum(dtype=np.int64)), settings.global_batch_size
    num_positions = num_rows * settings.seq_length
    if seq_lengths is not None:
        num_positions = int(np.repeat(seq_lengths, batch)[:num_rows].sum(dtype=np.int64))
    return PlanSummary(
        hash="",
        num_rows=num_rows,
        num_iterations=-(-num_rows // batch),
        num_samples=len(ids),
        num_tokens=num_tokens,
        num_images=int(pool.num_images[ids].sum(dtype=np.int64)),
        num_passes=made.num_passes,
        truncated=pool.truncated,
        dropped=pool.dropped,
        utilisation=num_tokens / max(num_positions, 1),
        split=pool.split,
        first_fragment_id=pool.samples[0][1],
        fewest_image_tokens=pool.tokens_per_image[0],
        most_image_tokens=pool.tokens_per_image[1],
        # In a longer training, an incomplete batch would be filled with rows of the next pass.
        stable_iterations=made.stable_rows // batch,
        later_samples=pool.samples[1:],
        step_iterations=step_iterations,
        nothing_to_train=pool.nothing_to_train,
    )


def _balance(
    settings: PlanSettings, pool: SamplePool, ids: np.ndarray, borders: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Order the rows of every full batch so that all ranks get even loads."""
    rows = len(borders) - 1
    full = rows - rows % settings.global_batch_size
    if not full:
        return ids, borders
    images, work = row_loads(pool, ids, borders)
    order = balance_ranks(images[:full], work[:full], settings.global_batch_size)
    return take_rows(ids, borders, np.concatenate([order, np.arange(full, rows)]))
