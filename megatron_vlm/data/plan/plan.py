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
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.config import DataError, config_to_dict
from megatron_vlm.data.plan.compute import PlannedRows, PlanSettings, PlanSummary, plan_rows
from megatron_vlm.data.plan.fragments import FragmentTable
from megatron_vlm.data.plan.sample_lengths import SampleLengths
from megatron_vlm.platform.files.durable import folder_once, remove_abandoned, storage_errors

__all__ = ["Plan", "PlanSettings", "PlanSummary", "PlannedRows", "build_plan", "hash_plan", "open_plan", "plan_rows"]

logger = logging.getLogger(__name__)

_PLAN_VERSION = 4
"""Goes into the hash; raise it with every change to the order of samples or to the files of a plan."""
_SUMMARY_FILE = "plan.json"
_LENGTH_OF_TRAINING = ("train_iters", "train_epochs")


class Plan:
    """An open plan; its arrays are memory-mapped.

    Sample ids number the samples of all datasets of the blend, one dataset after the other. With overflow "split",
    higher ids belong to the second and later fragments of long samples, and `fragments` says which tokens an id means.

    Args:
        folder: folder of this plan.
        settings: what it was built from.
        summary: what it holds.
        data_hash: hash of everything except the length of the training.
    """

    def __init__(self, folder: Path, settings: PlanSettings, summary: PlanSummary, data_hash: str) -> None:
        self.folder, self.settings, self.summary, self.data_hash = folder, settings, summary, data_hash
        self.hash, self.num_iterations = summary.hash, summary.num_iterations
        self.stable_iterations = summary.stable_iterations
        """Leading global batches that all plans with the same `data_hash` share, as far as they reach."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _array_names(settings)}
        self._sample_ids, self._borders = arrays["sample_ids"], arrays["row_borders"]
        self._seq_lengths = arrays.get("seq_lengths")
        table = arrays.get("fragments")
        self.fragments = None if table is None else FragmentTable(table, summary.first_fragment_id)
        """Which tokens an id means; None if every id is a whole sample, or its beginning."""

    def __reduce__(self) -> tuple:
        # Pickling a memory-mapped array would copy its whole content.
        return Plan, (self.folder, self.settings, self.summary, self.data_hash)

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
    """Build a plan, save it as a folder named by its hash in `folder`, and open it; an existing plan is only opened.

    There is one dataset per entry of the blend.

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
    with storage_errors("plan cannot be written", Path(folder)):
        target.parent.mkdir(parents=True, exist_ok=True)
        with folder_once(target) as unfinished:
            _write(unfinished, rows, settings, dataclasses.replace(rows.summary, hash=name))
    plan = open_plan(settings, datasets, folder)
    logger.info(
        "plan %s: %d samples in %d rows of %s%d, %d iterations, utilisation %.4f; of all samples, "
        "%d truncated, %d split, %d dropped",
        name,
        plan.summary.num_samples,
        plan.summary.num_rows,
        "up to " if settings.length_clustering else "",
        settings.seq_length,
        plan.num_iterations,
        plan.summary.utilisation,
        plan.summary.truncated,
        plan.summary.split,
        plan.summary.dropped,
    )
    return plan


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
        return Plan(path, settings, summary, _hash(settings, datasets, without=_LENGTH_OF_TRAINING))
    except FileNotFoundError as error:
        raise DataError(f"plan is missing: {error.filename}", where=str(path), fix="build it again") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"plan is damaged: {error}", where=str(path), fix="delete the folder") from None


def hash_plan(settings: PlanSettings, datasets: Sequence[SampleLengths]) -> str:
    """Return a hash of everything a plan depends on; the paths of the datasets do not matter."""
    return _hash(settings, datasets, without=())


def _hash(settings: PlanSettings, datasets: Sequence[SampleLengths], without: Sequence[str]) -> str:
    tree = _describe(settings)
    for entry in tree["blend"]:
        del entry["path"]
    for name in without:
        del tree[name]
    if not settings.length_clustering:
        del tree["length_multiple"]
    tree["datasets"] = [dataset.fingerprint for dataset in datasets]
    tree["version"] = _PLAN_VERSION
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def _describe(settings: PlanSettings) -> dict[str, Any]:
    tree = config_to_dict(settings) | {"image_tokens": settings.image_tokens.describe()}
    if settings.max_images_per_row is None:
        # As plans were before the setting, so that they stay valid.
        del tree["max_images_per_row"]
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
