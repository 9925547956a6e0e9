"""Join the datasets that the tasks of a job array have prepared, and divide a dataset; neither copies a shard.

The result is an ordinary dataset whose shards are hard links, with the same bytes as a single job would have written.
No reader needs to know about parts, and the parts may be deleted afterwards.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_vlm.config import ConfigError, DataError
from megatron_vlm.data.prepare.array_task import PART_OPTION, ArrayTask
from megatron_vlm.data.prepare.joining import check_not_empty, join_facts, number_shards
from megatron_vlm.data.prepare.output import dataset_beside, link_shards
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.manifest import (
    REJECTS_FILE,
    Manifest,
    ShardFacts,
    fault_of_file,
    save_manifest,
    without_content,
)


def merge_datasets(output: Path, folders: Sequence[Path]) -> Manifest:
    """Join all parts of one preparation, in any order, into the dataset that a single job would have written.

    Args:
        output: new folder on the file system of the parts; left alone if it already holds this dataset.
        folders: written by `prepare --part 1/N` to `N/N`.

    Raises:
        ConfigError: a part is missing, given twice or from another preparation; or the output folder is not empty.
        DataError: a part is unfinished or damaged, or no document became a sample.
        StorageError: the output cannot be written, or is on another file system.
    """
    if not folders:
        raise ConfigError("no part is given", fix="give the folders that prepare --part wrote")
    manifests = {folder: ShardedDataset.open(folder).manifest for folder in folders}
    ordered = _order_parts(manifests)
    bare = _common_manifest({folder: manifests[folder] for folder in ordered})
    for folder in ordered:
        _check_rejects(folder, manifests[folder])
    shards = [folder / shard.name for folder in ordered for shard in manifests[folder].shards]
    with dataset_beside(output) as unfinished:
        parts = [manifests[folder] for folder in ordered]
        manifest = join_facts(bare, parts, ordered, unfinished / REJECTS_FILE)
        check_not_empty(manifest, ordered[0] / REJECTS_FILE)
        link_shards(shards, unfinished)
        save_manifest(manifest, unfinished)
    return manifest


def split_dataset(folder: Path, output: Path, count: int) -> list[Path]:
    """Divide a dataset at the borders of its shards into datasets with about equally many samples.

    Documents and rejects are known only for the whole, so each new dataset counts its samples as its documents and has
    no rejects. Taken in order, the datasets hold the samples of the whole in order.

    Args:
        folder: the dataset; it is not changed.
        output: `output-1-of-3` to `output-3-of-3` are written, on the same file system, and returned.
        count: number of datasets.

    Raises:
        ConfigError: there are fewer shards than datasets, the dataset is only a part, or an output folder holds
            something else.
        DataError: the dataset is unfinished or damaged.
        StorageError: the output cannot be written, or is on another file system.
    """
    whole = ShardedDataset.open(folder).manifest
    if PART_OPTION in whole.options:
        raise ConfigError("dataset is a part of one", where=str(folder), fix="join the parts first: data merge")
    if not 1 <= count <= len(whole.shards):
        raise ConfigError(
            f"{len(whole.shards)} shards cannot become {count} datasets",
            where=str(folder),
            fix=f"use 1 to {len(whole.shards)}, or prepare with a smaller --max-shard-bytes",
        )
    written = []
    for number, shards in enumerate(_divide(whole.shards, count), start=1):
        target = output.with_name(f"{output.name}-{number}-of-{count}")
        manifest = dataclasses.replace(
            whole,
            shards=number_shards(shards),
            documents=sum(shard.counts.samples for shard in shards),
            rejects={},
            notes={},
            rejects_file=None,
            options=whole.options | {"split": {"index": number, "count": count}},
        )
        with dataset_beside(target) as unfinished:
            link_shards([folder / shard.name for shard in shards], unfinished)
            save_manifest(manifest, unfinished)
        written.append(target)
    return written


def _divide(shards: Sequence[ShardFacts], count: int) -> Iterator[Sequence[ShardFacts]]:
    """Yield runs of consecutive shards, none of them empty, with about equally many samples."""
    ends = list(itertools.accumulate(shard.counts.samples for shard in shards))
    first = 0
    for number in range(1, count + 1):
        target = ends[-1] * number / count
        # leaves at least one shard for this run and for every later one
        candidates = range(first + 1, len(shards) - (count - number) + 1)
        last = min(candidates, key=lambda end: abs(ends[end - 1] - target))
        yield shards[first:last]
        first = last


def _order_parts(manifests: dict[Path, Manifest]) -> list[Path]:
    """Return the folders in the order of their array tasks, of which each must be there once."""
    folders: dict[ArrayTask, Path] = {}
    for folder, manifest in manifests.items():
        option = manifest.options.get(PART_OPTION)
        if option is None:
            what = "dataset is whole, not a part of one"
            raise ConfigError(what, where=str(folder), fix="list several datasets in data.blend")
        task = ArrayTask(option["index"], option["count"])
        if task in folders:
            raise ConfigError(f"part {task} is given twice", where=f"{folders[task]}, {folder}", fix="give it once")
        folders[task] = folder
    counts = {task.count for task in folders}
    if len(counts) > 1:
        raise ConfigError(f"parts come from arrays of {sorted(counts)} tasks", fix="give the parts of one preparation")
    missing = [str(task) for task in (ArrayTask(i + 1, *counts) for i in range(*counts)) if task not in folders]
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(folders) + len(missing)} parts are missing: {', '.join(missing[:20])}",
            fix="prepare them, or give their folders",
        )
    return [folders[task] for task in sorted(folders, key=lambda task: task.index)]


def _common_manifest(manifests: dict[Path, Manifest]) -> Manifest:
    """Return the manifest of a single job with the inputs and options of all parts, without content."""
    found: dict[Path, Manifest] = {}
    for folder, manifest in manifests.items():
        options = {name: value for name, value in manifest.options.items() if name != PART_OPTION}
        found[folder] = dataclasses.replace(without_content(manifest), options=options)
    first, bare = next(iter(found.items()))
    for folder, other in found.items():
        if other != bare:
            what = "parts were prepared with different inputs, options or tokenizers"
            raise ConfigError(what, where=f"{first}, {folder}", fix="prepare one of them again")
    return bare


def _check_rejects(folder: Path, manifest: Manifest) -> None:
    """Compare the list of rejects of a part with its manifest; the shards are checked when they are read."""
    facts = manifest.rejects_file
    fault = "the manifest has no checksum of it" if facts is None else fault_of_file(folder / REJECTS_FILE, facts)
    if fault is not None:
        fix = "delete the folder of this part and prepare it again"
        raise DataError(f"part is damaged: {REJECTS_FILE}: {fault}", where=str(folder), fix=fix)
