"""The plan of a training run: which samples stand in which row, decided from their lengths.

The plan is built once, saved under a hash of everything it depends on, and memory-mapped by every rank. So the position
of a run is one integer.
"""

import dataclasses
import hashlib
import json
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.config import DataError, config_to_dict
from megatron_vlm.config.blend import steps_of
from megatron_vlm.data.plan.compute import PlannedRows, PlanSummary, plan_rows
from megatron_vlm.data.plan.fragments import FragmentTable
from megatron_vlm.data.plan.row_hash import chain_hash, hash_rows
from megatron_vlm.data.plan.sample_lengths import SampleLengths
from megatron_vlm.data.plan.settings import PlanSettings
from megatron_vlm.platform.files.durable import folder_once, remove_abandoned, storage_errors

__all__ = [
    "Plan",
    "PlanHashes",
    "PlanSummary",
    "PlannedRows",
    "build_plan",
    "hash_plan",
    "open_plan",
    "plan_rows",
]

logger = logging.getLogger(__name__)

_PLAN_VERSION = 4
"""Goes into the hash; raise it with every change to the order of samples or to the files of a plan."""
_SUMMARY_FILE = "plan.json"
_LENGTH_OF_TRAINING = ("train_iters", "train_epochs")


@dataclass(frozen=True, slots=True)
class PlanHashes:
    """What a plan is made from, without the length of the training."""

    data: str
    """Everything."""
    settings: str
    """Everything but the blend and its datasets."""
    datasets: tuple[str, ...]
    """Content of each dataset, and how much of it is left out."""


class Plan:
    """An open plan; its arrays are memory-mapped.

    Sample ids number the samples of all datasets of the blend, one dataset after the other. With overflow "split",
    higher ids belong to the second and later fragments of long samples, and `fragments` says which tokens an id means.

    Args:
        folder: folder of this plan.
        settings: what it was built from.
        summary: what it holds.
        hashes: what it was made from.
    """

    def __init__(self, folder: Path, settings: PlanSettings, summary: PlanSummary, hashes: PlanHashes) -> None:
        self.folder, self.settings, self.summary, self.hashes = folder, settings, summary, hashes
        self.hash, self.num_iterations = summary.hash, summary.num_iterations
        self.nothing_to_train = sum(summary.nothing_to_train)
        """Samples or fragments that are left out because a cut leaves them no token with a loss."""
        self.stable_iterations = summary.stable_iterations
        """Leading global batches that all plans with the same `hashes.data` share, as far as they reach."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _array_names(settings)}
        self._sample_ids, self._borders = arrays["sample_ids"], arrays["row_borders"]
        self._seq_lengths = arrays.get("seq_lengths")
        table = arrays.get("fragments")
        self.fragments = None if table is None else FragmentTable(table, self.sample_ranges)
        """Which tokens an id means; None if every id is a whole sample, or its beginning."""

    def __reduce__(self) -> tuple:
        # Pickling a memory-mapped array would copy its whole content.
        return Plan, (self.folder, self.settings, self.summary, self.hashes)

    @property
    def sample_ranges(self) -> tuple[tuple[int, int], ...]:
        """Begin and end of each range of ids of samples; the ids between and behind them belong to fragments."""
        later = ((begin, end) for begin, end in self.summary.later_samples)
        return ((0, self.summary.first_fragment_id), *later)

    @property
    def num_ids(self) -> int:
        """Ids of samples and fragments, which reach from 0 to one below it."""
        num_fragments = 0 if self.fragments is None else self.fragments.table.shape[1]
        return sum(end - begin for begin, end in self.sample_ranges) + num_fragments

    def dataset_starts(self, sizes: Sequence[int]) -> np.ndarray:
        """Return the id of the first sample of each dataset, int64[datasets].

        Args:
            sizes: samples of each dataset.
        """
        ranges = list(self.sample_ranges)
        starts, (start, end) = [], ranges.pop(0)
        for size in sizes:
            if start == end and ranges:
                start, end = ranges.pop(0)
            starts.append(start)
            start += size
        return np.array(starts, dtype=np.int64)

    def datasets_until(self, iteration: int) -> tuple[str, ...]:
        """Return the hashes of the datasets of all steps of the blend that begin before an iteration is done."""
        begun = sum(start < iteration for start in self.summary.step_iterations)
        return self.hashes.datasets[: 1 + max(max(s.datasets) for s in steps_of(self.settings.blend)[: 1 + begun])]

    def consumed_hash(self, iteration: int) -> str:
        """Return the hash of the samples of the first iterations, as a run that follows the plan chains it."""
        chained = ""
        for index in range(iteration):
            sample_ids, samples_per_row = self.rows(index)
            chained = chain_hash(chained, hash_rows(sample_ids, samples_per_row, range(len(samples_per_row))))
        return chained

    def seq_length(self, iteration: int) -> int:
        """Return the length of the rows of a global batch [tokens].

        Raises:
            IndexError: the plan has no such iteration.
        """
        self._check_iteration(iteration)
        return self.settings.seq_length if self._seq_lengths is None else int(self._seq_lengths[iteration])

    @property
    def num_rows(self) -> int:
        """Rows of all batches, including empty ones at the end."""
        return self.num_iterations * self.settings.global_batch_size

    def row(self, index: int) -> np.ndarray:
        """Return the global sample ids of a row, int64[samples]; an empty row at the end has none.

        Raises:
            IndexError: the plan has no such row.
        """
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of a plan of {self.num_rows}")
        if index >= self.summary.num_rows:
            return np.empty(0, dtype=np.int64)
        return self._sample_ids[self._borders[index] : self._borders[index + 1]].astype(np.int64)

    def rows(self, iteration: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples of a whole global batch.

        Returns:
            The global sample ids, row by row, int64[samples]; and how many each row holds,
            int64[global_batch_size].

        Raises:
            IndexError: the plan has no such iteration.
        """
        self._check_iteration(iteration)
        size = self.settings.global_batch_size
        # Rows after the last one that holds samples are empty.
        wanted = np.minimum(np.arange(iteration * size, (iteration + 1) * size + 1), self.summary.num_rows)
        borders = self._borders[wanted]
        return self._sample_ids[borders[0] : borders[-1]].astype(np.int64), np.diff(borders)

    def sample_ids(self, iteration: int) -> np.ndarray:
        """Return the global sample ids of a whole global batch, row by row, int64[samples].

        Raises:
            IndexError: the plan has no such iteration.
        """
        return self.rows(iteration)[0]

    def _check_iteration(self, iteration: int) -> None:
        if not 0 <= iteration < self.num_iterations:
            raise IndexError(f"iteration {iteration} of a plan of {self.num_iterations}")


def build_plan(settings: PlanSettings, datasets: Sequence[SampleLengths], folder: str | Path) -> Plan:
    """Build a plan, save it as a folder named by a hash in `folder`, and open it; an existing plan is only opened.

    The name is the hash of settings and datasets alone, so that a plan of an earlier version is found. Only the plan's
    own hash tells whether samples without a label are left out of it.

    There is one dataset per entry of `settings.datasets`.

    Raises:
        ConfigError: the blend cannot be made from these datasets.
        DataError: with overflow "fail", a sample is longer than a row or has too many images; with "split", an image is
            longer than a row. Or an existing plan is damaged.
        StorageError: the plan cannot be written.
    """
    name = hash_plan(settings, datasets)
    target = Path(folder) / name
    remove_abandoned(Path(folder))
    if target.exists():
        return open_plan(settings, datasets, folder)
    rows = plan_rows(settings, datasets)
    own_hash = hash_plan(settings, datasets, rows.summary.nothing_to_train)
    with storage_errors("plan cannot be written", Path(folder)):
        target.parent.mkdir(parents=True, exist_ok=True)
        with folder_once(target) as unfinished:
            _write(unfinished, rows, settings, dataclasses.replace(rows.summary, hash=own_hash))
    plan = open_plan(settings, datasets, folder)
    _log(plan)
    return plan


def _log(plan: Plan) -> None:
    settings = plan.settings
    logger.info(
        "plan %s: %d samples in %d rows of %s%d, %d iterations, utilisation %.4f; of all samples, "
        "%d truncated, %d split, %d dropped, %d with nothing_to_train left",
        plan.hash,
        plan.summary.num_samples,
        plan.summary.num_rows,
        "up to " if settings.length_clustering else "",
        settings.seq_length,
        plan.num_iterations,
        plan.summary.utilisation,
        plan.summary.truncated,
        plan.summary.split,
        plan.summary.dropped,
        plan.nothing_to_train,
    )
    for entry, number in zip(settings.datasets, plan.summary.nothing_to_train, strict=False):
        if number:
            logger.warning(
                "%s: %d %s left out, because the cut at data.seq_length=%d leaves no token with a loss "
                "(nothing_to_train)",
                entry.path,
                number,
                "fragments are" if settings.overflow == "split" else "samples are",
                settings.seq_length,
            )
    for iteration in plan.summary.step_iterations:
        logger.info("the blend changes after iteration %d", iteration)
    for step in steps_of(settings.blend)[1 + len(plan.summary.step_iterations) :]:
        begin = f"iteration {step.from_iteration}" if step.from_tokens is None else f"{step.from_tokens} tokens"
        logger.warning(
            "the step of data.blend from %s never begins: there are %d iterations", begin, plan.num_iterations
        )


def open_plan(settings: PlanSettings, datasets: Sequence[SampleLengths], folder: str | Path) -> Plan:
    """Open the plan that `build_plan` saved in `folder` for the same settings and datasets.

    Raises:
        DataError: the plan is missing or damaged.
    """
    path = Path(folder) / hash_plan(settings, datasets)
    try:
        tree = json.loads((path / _SUMMARY_FILE).read_bytes())
        summary = PlanSummary(**tree["summary"])
        for name in _array_names(settings):
            if zlib.crc32((path / f"{name}.npy").read_bytes()) != tree["crc32"][name]:
                raise ValueError(f"{name}.npy does not have the checksum it was written with")
        return Plan(path, settings, summary, _hashes(settings, datasets, summary.nothing_to_train))
    except FileNotFoundError as error:
        raise DataError(
            f"plan is missing: {error.filename}",
            where=str(path),
            fix="use the settings of the run, or train to build it again",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"plan is damaged: {error}", where=str(path), fix="delete the folder") from None


def hash_plan(settings: PlanSettings, datasets: Sequence[SampleLengths], nothing_to_train: Sequence[int] = ()) -> str:
    """Return a hash of everything a plan depends on; the paths of the datasets do not matter.

    Args:
        settings: of the plan.
        datasets: one per entry of `settings.datasets`.
        nothing_to_train: as in `PlanSummary`. Where nothing is left out, the hash is that of earlier versions.
    """
    return _hash(_depends_on(settings, datasets, nothing_to_train))


def _hashes(settings: PlanSettings, datasets: Sequence[SampleLengths], nothing_to_train: Sequence[int]) -> PlanHashes:
    tree = _depends_on(settings, datasets, nothing_to_train)
    for name in _LENGTH_OF_TRAINING:
        del tree[name]
    without_blend = {name: value for name, value in tree.items() if name not in ("blend", "steps", "datasets")}
    return PlanHashes(_hash(tree), _hash(without_blend), tuple(map(_hash, tree["datasets"])))


def _hash(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def _depends_on(
    settings: PlanSettings, datasets: Sequence[SampleLengths], nothing_to_train: Sequence[int]
) -> dict[str, Any]:
    tree = _describe(settings)
    for entry in tree["blend"]:
        del entry["path"]
    if not settings.length_clustering:
        del tree["length_multiple"]
    if len(steps := steps_of(settings.blend)) > 1:
        tree["steps"] = [step.datasets for step in steps]
    tree["datasets"] = [
        f"{dataset.fingerprint} without {left_out}" if left_out else dataset.fingerprint
        for dataset, left_out in zip(datasets, nothing_to_train or [0] * len(datasets), strict=True)
    ]
    tree["version"] = _PLAN_VERSION
    return tree


def _describe(settings: PlanSettings) -> dict[str, Any]:
    tree = config_to_dict(settings) | {"image_tokens": settings.image_tokens.describe()}
    if settings.max_images_per_row is None:
        # As plans were before the setting, so that they stay valid.
        del tree["max_images_per_row"]
    for entry in tree["blend"]:
        for name in ("from_iteration", "from_tokens"):
            if entry[name] is None:
                del entry[name]
    return tree


def _array_names(settings: PlanSettings) -> tuple[str, ...]:
    names = ["sample_ids", "row_borders"]
    if settings.overflow == "split":
        names.append("fragments")
    if settings.length_clustering:
        names.append("seq_lengths")
    return tuple(names)


def _write(folder: Path, rows: PlannedRows, settings: PlanSettings, summary: PlanSummary) -> None:
    checksums = {}
    arrays: dict[str, Any] = {
        "sample_ids": rows.sample_ids,
        "row_borders": rows.row_borders,
        "fragments": rows.pool.fragments,
        "seq_lengths": rows.seq_lengths,
    }
    for name in _array_names(settings):
        np.save(path := folder / f"{name}.npy", arrays[name])
        checksums[name] = zlib.crc32(path.read_bytes())
    tree = {"summary": dataclasses.asdict(summary), "settings": _describe(settings), "crc32": checksums}
    (folder / _SUMMARY_FILE).write_text(json.dumps(tree, indent=1) + "\n")
