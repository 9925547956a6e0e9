"""Keep account of the samples whose images cannot be read, and stop the run where there are too many."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_vlm.config import DataError
from megatron_vlm.data.loading.batch import BadImage
from megatron_vlm.data.shards.dataset import ShardedDataset, sizes_by_name
from megatron_vlm.parallel.collective import decide_on_main
from megatron_vlm.platform.files.durable import storage_errors
from megatron_vlm.platform.files.events import BAD_SAMPLES, record_event
from megatron_vlm.platform.files.metrics import drop_after

logger = logging.getLogger(__name__)

BAD_SAMPLES_NAME = "bad_samples.jsonl"


class BadSamples:
    """The samples with bad images that a run has met so far; all ranks make it and call it together.

    The first rank lists them in `bad_samples.jsonl` of the run folder, one line for each image, when they are met
    first: a sample of a later pass is not counted again. What was met after the resumed iteration is forgotten.

    Args:
        run_dir: the run folder.
        max_fraction: see `DataConfig.max_bad_fraction`.
        datasets: all that the run reads.
        iteration: iterations already done.

    Raises:
        StorageError: the list cannot be read or written.
    """

    def __init__(self, run_dir: Path, max_fraction: float, datasets: Sequence[ShardedDataset], iteration: int) -> None:
        self.path, self.max_fraction = run_dir / BAD_SAMPLES_NAME, max_fraction
        self._sizes = sizes_by_name(datasets)
        self._known: dict[str, set[str]] = {}
        self.counts: dict[str, int] = decide_on_main(lambda: self._open(iteration))
        """Samples with bad images by the name of their dataset, where there are any."""

    def note(self, mine: Sequence[BadImage], dataset_names: Sequence[str], iteration: int) -> None:
        """Add the bad images of a global batch, in which at least one rank has some.

        Args:
            mine: those of this rank.
            dataset_names: one for each entry of the blend.
            iteration: counted from 1.

        Raises:
            DataError: more samples of a dataset are bad than allowed; every rank raises it.
            StorageError: the list cannot be written; every rank raises it.
        """
        gathered: list[Sequence[BadImage]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, mine)
        # Ranks that share a tower decode the same images.
        distinct = {(bad.sample_id, bad.image): bad for images in gathered for bad in images}
        found = [distinct[key] for key in sorted(distinct)]
        self.counts = decide_on_main(lambda: self._record(found, dataset_names, iteration))

    def _open(self, iteration: int) -> dict[str, int]:
        with storage_errors("list of bad samples cannot be read", self.path):
            for record in drop_after(self.path, iteration):
                dataset, sample = record.get("dataset"), record.get("sample")
                if isinstance(dataset, str) and isinstance(sample, str):  # else a damaged disk
                    self._known.setdefault(dataset, set()).add(_place(sample))
        return self._count()

    def _record(self, found: Sequence[BadImage], dataset_names: Sequence[str], iteration: int) -> dict[str, int]:
        before = {name: set(places) for name, places in self._known.items()}
        lines, last = [], None
        for bad in found:
            name, place = dataset_names[bad.dataset], _place(bad.where)
            if place in before.get(name, ()):
                continue
            self._known.setdefault(name, set()).add(place)
            record = {"iteration": iteration, "dataset": name, "sample": bad.where, "sample_id": bad.sample_id}
            lines.append(json.dumps({**record, "image": bad.image, "reason": bad.reason}) + "\n")
            last = bad
        if last is None:
            return self._count()
        with storage_errors("list of bad samples cannot be written", self.path), self.path.open("a") as stream:
            stream.write("".join(lines))
        name = dataset_names[last.dataset]
        what = (
            f"{len(lines)} images cannot be read at iteration {iteration}, and blank ones take their place; "
            f"{len(self._known[name])} of {self._sizes[name]} samples of {name} so far"
        )
        logger.warning("%s; the last: %s (%s); all are in %s", what, last.reason, last.where, self.path)
        record_event(self.path.parent, BAD_SAMPLES, what, iteration=iteration, counts=self._count())
        self._check(found, dataset_names)
        return self._count()

    def _check(self, found: Sequence[BadImage], dataset_names: Sequence[str]) -> None:
        for bad in found:
            name = dataset_names[bad.dataset]
            number, size = len(self._known[name]), self._sizes[name]
            if number > self.max_fraction * size:
                raise DataError(
                    f"{number} of {size} samples of {name} have unreadable images, data.max_bad_fraction is "
                    f"{self.max_fraction}: {bad.reason}",
                    where=bad.where,
                    fix=f"see {BAD_SAMPLES_NAME} in the run folder; prepare it again, or raise the fraction",
                )

    def _count(self) -> dict[str, int]:
        return {name: len(places) for name, places in sorted(self._known.items())}


def _place(where: str) -> str:
    """Return shard and sample; folders may be moved between two starts of a run."""
    return where.rpartition("/")[2]
