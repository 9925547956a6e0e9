"""Compute the plan of a training run: samples of a blend in epochs, packed into rows, rows in even global batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_vlm.config import BlendEntry, DataError, TrainConfig
from megatron_vlm.data.balance import balance_ranks, deal_rows
from megatron_vlm.data.blend import read_in_epochs, samples_per_pass
from megatron_vlm.data.packing import pack_samples


class SampleLengths(Protocol):
    """What the plan needs to know of a dataset; `ShardedDataset` has it."""

    fingerprint: str
    """Changes with the content."""

    @property
    def num_images(self) -> np.ndarray:
        """int32[samples]."""

    @property
    def text_lengths(self) -> np.ndarray:
        """int32[samples] [tokens]."""

    def __len__(self) -> int: ...

    def outlines(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return borders, kinds and tokens of the segments of some samples, as `ShardedDataset.outlines` does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """All settings that a plan depends on."""

    blend: tuple[BlendEntry, ...]
    seq_length: int
    num_image_tokens: int
    packing: bool
    overflow: str
    seed: int
    global_batch_size: int
    train_iters: int | None
    train_epochs: float | None

    @classmethod
    def from_config(cls, config: TrainConfig) -> "PlanSettings":
        """Collect them from a run's settings."""
        return cls(
            blend=config.data.blend,
            seq_length=config.data.seq_length,
            num_image_tokens=config.model.vision.num_image_tokens,
            packing=config.data.packing,
            overflow=config.data.overflow,
            seed=config.training.seed,
            global_batch_size=config.training.global_batch_size,
            train_iters=config.training.train_iters,
            train_epochs=config.training.train_epochs,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSummary:
    """What a plan holds; counts are over the whole training."""

    hash: str
    num_rows: int
    """Rows with samples; the rest of the last batch is empty."""
    num_iterations: int
    num_samples: int
    num_tokens: int
    """Tokens of all rows, padding excluded."""
    num_images: int
    num_passes: int
    """Passes over the blend that were begun."""
    truncated: int
    """Samples of the datasets that are cut because they are longer than a row."""
    dropped: int
    """Samples of the datasets that are left out for the same reason."""
    utilisation: float
    """Share of the positions of the rows that hold a token."""


@dataclass(frozen=True, slots=True)
class PlannedRows:
    """A plan in memory."""

    sample_ids: np.ndarray
    """uint32 or int64[samples]; row after row."""
    row_borders: np.ndarray
    """int64[rows + 1]."""
    summary: PlanSummary


@dataclass(frozen=True, slots=True)
class _Pool:
    """The samples of all datasets under their global ids."""

    lengths: np.ndarray
    """int32[samples], cut to a row [tokens]."""
    num_images: np.ndarray
    """int32[samples]."""
    usable: tuple[np.ndarray, ...]
    """Per dataset: global ids of the samples that take part."""
    truncated: int
    dropped: int


def plan_rows(settings: PlanSettings, datasets: Sequence[SampleLengths]) -> PlannedRows:
    """Compute a plan without saving it.

    The plan of a longer training over the same datasets begins with the rows of the shorter one.

    Raises:
        ConfigError: the blend cannot be made from these datasets.
        DataError: with overflow "fail", a sample is longer than a row.
    """
    pool = _collect(settings, datasets)
    sizes = [len(ids) for ids in pool.usable]
    images = [int(pool.num_images[ids].sum(dtype=np.int64)) for ids in pool.usable]
    per_pass = samples_per_pass(settings.blend, sizes, images)
    wanted_rows = None if settings.train_iters is None else settings.train_iters * settings.global_batch_size
    kind: Any = np.uint32 if len(pool.lengths) <= np.iinfo(np.uint32).max else np.int64
    ids, borders = np.empty(0, dtype=kind), np.zeros(1, dtype=np.int64)
    num_passes = 0
    while _wants_more(num_passes, len(borders) - 1, wanted_rows, settings.train_epochs):
        end = num_passes + 1.0 if settings.train_epochs is None else min(num_passes + 1.0, settings.train_epochs)
        samples = _samples_of_pass(settings, pool, num_passes * per_pass, end * per_pass)
        rng = np.random.default_rng([settings.seed, 1, num_passes])
        limit = None if wanted_rows is None else wanted_rows - (len(borders) - 1)
        samples, ends = _rows_of_pass(settings, pool, samples, len(borders) - 1, limit, rng)
        ids = np.concatenate([ids, samples.astype(kind)])
        borders = np.concatenate([borders, ends[1:] + borders[-1]])
        num_passes += 1
    ids, borders = _balance(settings, pool, ids, borders)
    return PlannedRows(ids, borders, _summarise(settings, pool, ids, len(borders) - 1, num_passes))


def _summarise(settings: PlanSettings, pool: "_Pool", ids: np.ndarray, num_rows: int, num_passes: int) -> PlanSummary:
    num_tokens = int(pool.lengths[ids].sum(dtype=np.int64))
    return PlanSummary(
        hash="",
        num_rows=num_rows,
        num_iterations=-(-num_rows // settings.global_batch_size),
        num_samples=len(ids),
        num_tokens=num_tokens,
        num_images=int(pool.num_images[ids].sum(dtype=np.int64)),
        num_passes=num_passes,
        truncated=pool.truncated,
        dropped=pool.dropped,
        utilisation=num_tokens / (max(num_rows, 1) * settings.seq_length),
    )


def _wants_more(num_passes: int, num_rows: int, wanted_rows: int | None, train_epochs: float | None) -> bool:
    if wanted_rows is not None:
        return num_rows < wanted_rows
    return train_epochs is not None and num_passes < train_epochs


def _collect(settings: PlanSettings, datasets: Sequence[SampleLengths]) -> _Pool:
    """Number the samples of all datasets and settle what happens to those longer than a row."""
    lengths, images, usable = [], [], []
    truncated = dropped = first = 0
    for entry, dataset in zip(settings.blend, datasets, strict=True):
        num_images = dataset.num_images
        total = num_images * np.int32(settings.num_image_tokens) + dataset.text_lengths
        longer = np.flatnonzero(total > settings.seq_length)
        kept = np.arange(first, first + len(total))
        if len(longer) and settings.overflow == "fail":
            raise _too_long(entry, settings.seq_length, total, len(longer))
        if settings.overflow == "drop":
            kept = np.delete(kept, longer)
            dropped += len(longer)
        elif len(longer):
            num_images = num_images.copy()
            cut = cut_outlines(*dataset.outlines(longer), settings.seq_length, settings.num_image_tokens)
            total[longer], num_images[longer] = cut
            nothing_fits = longer[total[longer] == 0]
            kept = np.delete(kept, nothing_fits)
            dropped += len(nothing_fits)
            truncated += len(longer) - len(nothing_fits)
        lengths.append(total)
        images.append(num_images)
        usable.append(kept)
        first += len(total)
    return _Pool(np.concatenate(lengths), np.concatenate(images), tuple(usable), truncated, dropped)


def cut_outlines(
    borders: np.ndarray, is_image: np.ndarray, text_lengths: np.ndarray, max_tokens: int, num_image_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and images of samples that are cut after the last whole image and the last token that fit.

    Args:
        borders: int64[samples + 1]; segments of each sample, at least one.
        is_image: bool[segments]; in reading order.
        text_lengths: int[segments]; 0 for images [tokens].
        max_tokens: where the samples are cut.
        num_image_tokens: tokens of an image.

    Returns:
        Two int64[samples].
    """
    ends = np.cumsum(np.where(is_image, num_image_tokens, text_lengths), dtype=np.int64)
    starts = np.concatenate([[0], ends])[borders[:-1]]
    ends -= np.repeat(starts, np.diff(borders))
    fits = ends <= max_tokens
    whole = np.add.reduceat(fits, borders[:-1], dtype=np.int64)
    num_images = np.add.reduceat(fits & is_image, borders[:-1], dtype=np.int64)
    last = borders[:-1] + whole - 1
    kept = np.where(whole > 0, ends[last], 0)
    cut_in_text = (whole < np.diff(borders)) & ~is_image[np.minimum(last + 1, len(is_image) - 1)]
    return np.where(cut_in_text, max_tokens, kept), num_images


def _too_long(entry: BlendEntry, seq_length: int, total: np.ndarray, number: int) -> DataError:
    worst = int(total.argmax())
    return DataError(
        f"{number} samples are longer than data.seq_length={seq_length}; the longest has {int(total[worst])} tokens",
        where=f"{entry.path} sample {worst}",
        fix="raise data.seq_length, or set data.overflow to truncate or drop",
    )


def _samples_of_pass(settings: PlanSettings, pool: _Pool, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Return the global ids of one pass; passes together read every dataset in whole epochs."""
    pieces = []
    for index, ids in enumerate(pool.usable):
        first, last = round(float(start[index])), round(float(stop[index]))
        pieces.append(ids[read_in_epochs(len(ids), first, last, (settings.seed, 0, index))])
    return np.concatenate(pieces)


def _rows_of_pass(
    settings: PlanSettings,
    pool: _Pool,
    samples: np.ndarray,
    first_slot: int,
    limit: int | None,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples of a pass row after row, and the borders of the rows."""
    if settings.packing:
        packed = pack_samples(pool.lengths[samples], settings.seq_length, rng)
        samples, borders = samples[packed.order], packed.borders
    else:
        borders = np.arange(len(samples) + 1)
    if not len(samples):
        return samples, borders
    images, work = _row_loads(pool, samples, borders)
    rows = deal_rows(images, work, first_slot=first_slot, global_batch_size=settings.global_batch_size, rng=rng)
    return _take_rows(samples, borders, rows[:limit])


def _balance(
    settings: PlanSettings, pool: _Pool, ids: np.ndarray, borders: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Put the rows of every full batch in an order in which every rank's part is even."""
    rows = len(borders) - 1
    full = rows - rows % settings.global_batch_size
    if not full:
        return ids, borders
    images, work = _row_loads(pool, ids, borders)
    order = balance_ranks(images[:full], work[:full], settings.global_batch_size)
    return _take_rows(ids, borders, np.concatenate([order, np.arange(full, rows)]))


def _row_loads(pool: _Pool, ids: np.ndarray, borders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return images and attention work (the sum of squares of the lengths) of each row."""
    images = np.add.reduceat(pool.num_images[ids], borders[:-1])
    return images, np.add.reduceat(np.square(pool.lengths[ids], dtype=np.float64), borders[:-1])


def _take_rows(ids: np.ndarray, borders: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples of the chosen rows in their order, and the borders of these rows."""
    sizes = np.diff(borders)[rows]
    new_borders = np.concatenate([[0], np.cumsum(sizes)])
    source = np.arange(new_borders[-1]) + np.repeat(borders[:-1][rows] - new_borders[:-1], sizes)
    return ids[source], new_borders
