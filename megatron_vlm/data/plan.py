"""The plan of a training run: which samples stand in which row, from lengths alone.

It is built once, saved under a hash of everything it depends on, and memory-mapped by every rank, so that the position
of a run is one integer.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_vlm.config import BlendEntry, DataError, StorageError, TrainConfig, config_to_dict
from megatron_vlm.data.balance import order_rows
from megatron_vlm.data.blend import read_in_epochs, samples_per_pass
from megatron_vlm.data.packing import pack_samples

logger = logging.getLogger(__name__)

_PLAN_VERSION = 1
"""Part of the hash; to be raised by every change that orders samples in another way."""
_SUMMARY_FILE = "plan.json"
_ARRAYS = ("sample_ids", "row_borders")


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


class Plan:
    """An open plan; its arrays are memory-mapped.

    Args:
        folder: folder of this one plan.
        settings: what it was built from.
        summary: what it holds.
    """

    def __init__(self, folder: Path, settings: PlanSettings, summary: PlanSummary) -> None:
        self.folder, self.settings, self.summary = folder, settings, summary
        self._sample_ids, self._borders = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)

    def __reduce__(self) -> tuple:
        # A memory-mapped array would be pickled with its whole content.
        return Plan, (self.folder, self.settings, self.summary)

    @property
    def hash(self) -> str:
        """Hash of everything the plan depends on."""
        return self.summary.hash

    @property
    def num_iterations(self) -> int:
        """Global batches."""
        return self.summary.num_iterations

    @property
    def utilisation(self) -> float:
        """Share of the positions of the rows that hold a token; empty rows at the end are not counted."""
        return self.summary.utilisation

    @property
    def num_rows(self) -> int:
        """Rows of all batches, empty ones at the end included."""
        return self.num_iterations * self.settings.global_batch_size

    def row(self, index: int) -> np.ndarray:
        """Return the global sample ids of a row, int64[samples]; none for an empty row at the end.

        Raises:
            IndexError: the plan has no such row.
        """
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of a plan of {self.num_rows}")
        if index >= self.summary.num_rows:
            return np.empty(0, dtype=np.int64)
        return self._sample_ids[self._borders[index] : self._borders[index + 1]].astype(np.int64)

    def sample_ids(self, iteration: int) -> np.ndarray:
        """Return the global sample ids of a whole global batch, row after row, int64[samples].

        Raises:
            IndexError: the plan has no such iteration.
        """
        if not 0 <= iteration < self.num_iterations:
            raise IndexError(f"iteration {iteration} of a plan of {self.num_iterations}")
        size = self.settings.global_batch_size
        first, last = (min(row, self.summary.num_rows) for row in (iteration * size, (iteration + 1) * size))
        return self._sample_ids[self._borders[first] : self._borders[last]].astype(np.int64)


def build_plan(settings: PlanSettings, datasets: Sequence[SampleLengths], folder: str | Path) -> Plan:
    """Build the plan, save it as a folder named by its hash in `folder`, and open it; an existing one is only opened.

    Args:
        settings: what to plan.
        datasets: one per entry of the blend.
        folder: where plans are kept.

    Raises:
        ConfigError: the blend cannot be made from these datasets.
        DataError: with overflow "fail", a sample is longer than a row; or an existing plan is damaged.
        StorageError: the plan cannot be written.
    """
    name = hash_plan(settings, datasets)
    target = Path(folder) / name
    if target.exists():
        return open_plan(settings, datasets, folder)
    rows = plan_rows(settings, datasets)
    temporary = target.with_name(f"{name}.tmp{os.getpid()}")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        _write(temporary, rows, settings, dataclasses.replace(rows.summary, hash=name))
        os.rename(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not target.exists():  # another process may have been faster: its plan is the same
            raise StorageError(f"plan cannot be written: {error}", where=str(folder), fix="make room there") from None
    plan = open_plan(settings, datasets, folder)
    logger.info(
        "plan %s: %d samples in %d rows of %d, %d iterations, utilisation %.4f, %d truncated, %d dropped",
        name,
        plan.summary.num_samples,
        plan.summary.num_rows,
        settings.seq_length,
        plan.num_iterations,
        plan.utilisation,
        plan.summary.truncated,
        plan.summary.dropped,
    )
    return plan


def open_plan(settings: PlanSettings, datasets: Sequence[SampleLengths], folder: str | Path) -> Plan:
    """Open the plan that `build_plan` saved in `folder` for the same settings and datasets.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = Path(folder) / hash_plan(settings, datasets)
    try:
        tree = json.loads((path / _SUMMARY_FILE).read_bytes())
        summary = PlanSummary(**tree["summary"])
        for name in _ARRAYS:
            if zlib.crc32((path / f"{name}.npy").read_bytes()) != tree["crc32"][name]:
                raise ValueError(f"{name}.npy does not have the checksum it was written with")
        return Plan(path, settings, summary)
    except FileNotFoundError as error:
        raise DataError(f"plan is missing: {error.filename}", where=str(path), fix="build it again") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"plan is damaged: {error}", where=str(path), fix="delete the folder") from None


def hash_plan(settings: PlanSettings, datasets: Sequence[SampleLengths]) -> str:
    """Return a hash of everything a plan depends on; where the datasets lie is no part of it."""
    tree = config_to_dict(settings)
    for entry in tree["blend"]:
        del entry["path"]
    tree["datasets"] = [dataset.fingerprint for dataset in datasets]
    tree["version"] = _PLAN_VERSION
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


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

    Raises:
        ConfigError: the blend cannot be made from these datasets.
        DataError: with overflow "fail", a sample is longer than a row.
    """
    pool = _collect(settings, datasets)
    sizes = [len(ids) for ids in pool.usable]
    images = [int(pool.num_images[ids].sum()) for ids in pool.usable]
    per_pass = samples_per_pass(settings.blend, sizes, images)
    wanted_rows = None if settings.train_iters is None else settings.train_iters * settings.global_batch_size
    kind: Any = np.uint32 if len(pool.lengths) <= np.iinfo(np.uint32).max else np.int64
    ids, borders = [np.empty(0, dtype=kind)], [np.zeros(1, dtype=np.int64)]
    num_rows = num_passes = num_tokens = num_images = 0
    while _wants_more(num_passes, num_rows, wanted_rows, settings.train_epochs):
        end = num_passes + 1.0 if settings.train_epochs is None else min(num_passes + 1.0, settings.train_epochs)
        samples = _samples_of_pass(settings, pool, num_passes * per_pass, end * per_pass)
        rng = np.random.default_rng([settings.seed, 1, num_passes])
        limit = None if wanted_rows is None else wanted_rows - num_rows
        samples, ends = _rows_of_pass(settings, pool, samples, num_rows, limit, rng)
        ids.append(samples.astype(kind))
        borders.append(ends + borders[-1][-1])
        num_rows += len(ends)
        num_tokens += int(pool.lengths[samples].sum(dtype=np.int64))
        num_images += int(pool.num_images[samples].sum(dtype=np.int64))
        num_passes += 1
    summary = PlanSummary(
        hash="",
        num_rows=num_rows,
        num_iterations=-(-num_rows // settings.global_batch_size),
        num_samples=sum(map(len, ids)),
        num_tokens=num_tokens,
        num_images=num_images,
        num_passes=num_passes,
        truncated=pool.truncated,
        dropped=pool.dropped,
        utilisation=num_tokens / (max(num_rows, 1) * settings.seq_length),
    )
    return PlannedRows(np.concatenate(ids), np.concatenate(borders), summary)


def _wants_more(num_passes: int, num_rows: int, wanted_rows: int | None, train_epochs: float | None) -> bool:
    if wanted_rows is not None:
        return num_rows < wanted_rows
    return train_epochs is not None and num_passes < train_epochs


def _collect(settings: PlanSettings, datasets: Sequence[SampleLengths]) -> _Pool:
    """Number the samples of all datasets and settle what happens to those longer than a row."""
    lengths, images, usable = [], [], []
    truncated = dropped = first = 0
    for entry, dataset in zip(settings.blend, datasets, strict=True):
        total = dataset.num_images * np.int32(settings.num_image_tokens) + dataset.text_lengths
        longer = total > settings.seq_length
        if settings.overflow == "fail" and longer.any():
            worst = int(total.argmax())
            raise DataError(
                f"{int(longer.sum())} samples are longer than data.seq_length={settings.seq_length}; the longest has "
                f"{int(total[worst])} tokens",
                where=f"{entry.path} sample {worst}",
                fix="raise data.seq_length, or set data.overflow to truncate or drop",
            )
        keep = ~longer if settings.overflow == "drop" else np.ones(len(total), dtype=bool)
        usable.append(first + np.flatnonzero(keep))
        dropped += int((~keep).sum())
        truncated += int((longer & keep).sum())
        lengths.append(np.minimum(total, settings.seq_length))
        images.append(dataset.num_images)
        first += len(total)
    return _Pool(np.concatenate(lengths), np.concatenate(images), tuple(usable), truncated, dropped)


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
    """Return the samples of a pass row after row, and the end of each row."""
    lengths = pool.lengths[samples]
    if settings.packing:
        packed = pack_samples(lengths, settings.seq_length, rng)
        samples, lengths, borders = samples[packed.order], lengths[packed.order], packed.borders
    else:
        borders = np.arange(len(samples) + 1)
    if not len(samples):
        return samples, borders[1:]
    images = np.add.reduceat(pool.num_images[samples], borders[:-1])
    work = np.add.reduceat(np.square(lengths, dtype=np.float64), borders[:-1])
    rows = order_rows(images, work, first_slot=first_slot, global_batch_size=settings.global_batch_size, rng=rng)[
        :limit
    ]
    sizes = np.diff(borders)[rows]
    ends = np.cumsum(sizes)
    source = np.arange(ends[-1]) + np.repeat(borders[:-1][rows] - (ends - sizes), sizes)
    return samples[source], ends


def _write(folder: Path, rows: PlannedRows, settings: PlanSettings, summary: PlanSummary) -> None:
    checksums = {}
    for name in _ARRAYS:
        path = folder / f"{name}.npy"
        np.save(path, getattr(rows, name))
        checksums[name] = zlib.crc32(path.read_bytes())
    tree = {"summary": dataclasses.asdict(summary), "settings": config_to_dict(settings), "crc32": checksums}
    (folder / _SUMMARY_FILE).write_text(json.dumps(tree, indent=1) + "\n")
