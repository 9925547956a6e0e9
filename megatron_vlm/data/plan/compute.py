"""Compute the plan of a training run: epochs of a blend, packed into rows, in evenly loaded global batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_vlm.config import BlendEntry, ConfigError, TrainConfig
from megatron_vlm.data.plan.balance import balance_ranks, deal_rows
from megatron_vlm.data.plan.blend import read_in_epochs, samples_per_pass
from megatron_vlm.data.plan.clustering import cluster_by_length, clustered_row_lengths
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.plan.packing import ImageBudget, pack_samples
from megatron_vlm.data.plan.sample_lengths import SampleLengths
from megatron_vlm.data.plan.sample_pool import Overflow, SamplePool, collect_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """All settings that a plan depends on."""

    blend: tuple[BlendEntry, ...]
    seq_length: int
    image_tokens: ImageTokens
    packing: bool
    overflow: Overflow
    seed: int
    global_batch_size: int
    train_iters: int | None
    train_epochs: float | None
    sample_multiple: int = 1
    length_clustering: bool = False
    length_multiple: int = 64
    max_images_per_row: int | None = None

    @classmethod
    def from_config(cls, config: TrainConfig) -> "PlanSettings":
        """Take them from the settings of a run."""
        return cls(
            blend=config.data.blend,
            seq_length=config.data.seq_length,
            image_tokens=ImageTokens.from_model(config.model),
            packing=config.data.packing,
            overflow=config.data.overflow,
            seed=config.training.seed,
            global_batch_size=config.training.global_batch_size,
            train_iters=config.training.train_iters,
            train_epochs=config.training.train_epochs,
            sample_multiple=config.data.sample_multiple,
            length_clustering=config.data.length_clustering,
            length_multiple=config.data.length_multiple,
            max_images_per_row=config.data.max_images_per_row,
        )


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
    """Number of samples in all datasets; ids from here on belong to the second and later fragments of split samples."""
    fewest_image_tokens: int = 0
    """Fewest tokens of an image in the datasets; 0 if there are no images and the number is not constant."""
    most_image_tokens: int = 0
    """Most tokens of an image in the datasets."""
    stable_iterations: int = 0
    """Leading global batches that every longer training over the same data shares."""


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
    them if the length is given as train_iters, those of complete passes if it is given as train_epochs.

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
    sizes = [len(ids) for ids in pool.usable]
    images = [int(pool.num_images[ids].sum(dtype=np.int64)) for ids in pool.usable]
    per_pass = samples_per_pass(settings.blend, sizes, images)
    wanted_rows = None if settings.train_iters is None else settings.train_iters * settings.global_batch_size
    kind: Any = np.uint32 if len(pool.lengths) <= np.iinfo(np.uint32).max else np.int64
    _check_pass(settings, per_pass)
    parts, sizes_of_rows = [np.empty(0, dtype=kind)], [np.empty(0, dtype=np.int64)]
    num_passes = num_rows = stable_rows = 0
    while _wants_more(num_passes, num_rows, wanted_rows, settings.train_epochs):
        end = num_passes + 1.0 if settings.train_epochs is None else min(num_passes + 1.0, settings.train_epochs)
        samples = _samples_of_pass(settings, pool, num_passes * per_pass, end * per_pass)
        rng = np.random.default_rng([settings.seed, 1, num_passes])
        limit = None if wanted_rows is None else wanted_rows - num_rows
        samples, ends = _rows_of_pass(settings, pool, samples, num_rows, limit, rng)
        parts.append(samples.astype(kind))
        sizes_of_rows.append(np.diff(ends))
        num_rows += len(ends) - 1
        num_passes += 1
        if end == num_passes:
            stable_rows = num_rows
    ids, borders = np.concatenate(parts), np.concatenate([[0], np.cumsum(np.concatenate(sizes_of_rows))])
    ids, borders = _balance(settings, pool, ids, borders)
    seq_lengths = None
    if settings.length_clustering:
        seq_lengths = clustered_row_lengths(
            pool.lengths[ids],
            global_batch_size=settings.global_batch_size,
            multiple=settings.length_multiple,
            seq_length=settings.seq_length,
        )
    summary = _summarise(settings, pool, ids, len(borders) - 1, num_passes, seq_lengths, stable_rows)
    return PlannedRows(ids, borders, seq_lengths, pool, summary)


def _summarise(
    settings: PlanSettings,
    pool: SamplePool,
    ids: np.ndarray,
    num_rows: int,
    num_passes: int,
    seq_lengths: np.ndarray | None,
    stable_rows: int,
) -> PlanSummary:
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
        num_passes=num_passes,
        truncated=pool.truncated,
        dropped=pool.dropped,
        utilisation=num_tokens / max(num_positions, 1),
        split=pool.split,
        first_fragment_id=pool.num_samples,
        fewest_image_tokens=pool.tokens_per_image[0],
        most_image_tokens=pool.tokens_per_image[1],
        # In a longer training, an incomplete batch would be filled with rows of the next pass.
        stable_iterations=stable_rows // batch,
    )


def _check_pass(settings: PlanSettings, per_pass: np.ndarray) -> None:
    """Reject passes that are nearly empty, of which a training of train_iters would need millions.

    Raises:
        ConfigError: a pass has less than one sample, or reads only a fraction of every dataset and fills no batch.
    """
    samples = float(per_pass.sum())
    is_partial = settings.train_iters is not None and all((entry.epochs or 1.0) < 1 for entry in settings.blend)
    least = settings.global_batch_size if is_partial else 1
    if samples < least:
        raise ConfigError(
            f"a pass over data.blend has {samples:.3g} samples, fewer than {least}",
            fix=f"multiply the epochs of the entries by {least / samples:.3g} or more",
        )


def _wants_more(num_passes: int, num_rows: int, wanted_rows: int | None, train_epochs: float | None) -> bool:
    if wanted_rows is not None:
        return num_rows < wanted_rows
    return train_epochs is not None and num_passes < train_epochs


def _samples_of_pass(settings: PlanSettings, pool: SamplePool, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Return the global ids of one pass; consecutive passes read every dataset in complete epochs."""
    samples = []
    for index, ids in enumerate(pool.usable):
        first, last = round(float(start[index])), round(float(stop[index]))
        samples.append(ids[read_in_epochs(len(ids), first, last, (settings.seed, 0, index))])
    return np.concatenate(samples)


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
    return _take_rows(samples, borders, rows[:limit])


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
    return _take_rows(ids, borders, np.concatenate([order, np.arange(full, rows)]))


def row_loads(pool: SamplePool, ids: np.ndarray, borders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and the attention work (the sum of squared sample lengths) of each row.

    Args:
        pool: all samples by id.
        ids: int[n]; samples, row by row.
        borders: int64[rows + 1]; no row is empty.
    """
    images = np.add.reduceat(pool.num_images[ids], borders[:-1])
    return images, np.add.reduceat(np.square(pool.lengths[ids], dtype=np.float64), borders[:-1])


def _take_rows(ids: np.ndarray, borders: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples of the chosen rows, in this order, and the borders of the rows."""
    sizes = np.diff(borders)[rows]
    new_borders = np.concatenate([[0], np.cumsum(sizes)])
    source = np.arange(new_borders[-1]) + np.repeat(borders[:-1][rows] - new_borders[:-1], sizes)
    return ids[source], new_borders
