"""Join the shares that the jobs of an array have prepared into one dataset, and divide a dataset, copying no shard.

The shards are hard links: the result is an ordinary dataset, to the byte the one that a single job would have written,
so that no reader needs to know of parts; and the parts may be deleted afterwards. References in the manifest would
have made every reader follow them, and a moved or deleted part would break the whole.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_vlm.config import ConfigError, DataError
from megatron_vlm.data.prepare.joining import check_not_empty, join_facts
from megatron_vlm.data.prepare.output import dataset_beside, link_shards
from megatron_vlm.data.prepare.share import SHARE_OPTION, Share
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
    """Join all shares of one preparation, in any order, into the dataset that one job would have written.

    Args:
        output: new folder on the file system of the parts; left alone if it holds this very dataset.
        folders: what `prepare --part 1/N` to `N/N` wrote.

    Returns:
        The manifest of the whole.

    Raises:
        ConfigError: a part is missing, given twice or of another preparation; or the output folder is not empty.
        DataError: a part is unfinished or damaged, or no document became a sample.
        StorageError: the output cannot be written, or is on another file system.
    """
    if not folders:
        raise ConfigError("no part is given", fix="give the folders that prepare --part wrote")
    manifests = {folder: ShardedDataset.open(folder).manifest for folder in folders}
    ordered = _order_shares(manifests)
    plan = _common_plan({folder: manifests[folder] for folder in ordered})
    for folder in ordered:
        _check_rejects(folder, manifests[folder])
    pieces = [manifests[folder] for folder in ordered]
    sources = [folder / shard.name for folder in ordered for shard in manifests[folder].shards]
    with dataset_beside(output) as unfinished:
        manifest = join_facts(plan, pieces, ordered, unfinished / REJECTS_FILE)
        check_not_empty(manifest, ordered[0] / REJECTS_FILE)
        link_shards(sources, manifest.shards, unfinished)
        save_manifest(manifest, unfinished)
    return manifest


def split_dataset(folder: Path, output: Path, count: int) -> list[Path]:
    """Divide a dataset at the borders of its shards into datasets with about equally many samples.

    What the datasets were made from is known of the whole only, so that each counts its samples as its documents and
    has no rejects; their samples, in order, are those of the whole in order.

    Args:
        folder: the dataset; it stays as it is.
        output: `output-1-of-3` to `output-3-of-3` are written, on the same file system.
        count: how many.

    Returns:
        The new folders.

    Raises:
        ConfigError: fewer shards than datasets, a part of a dataset, or an output folder that holds something else.
        DataError: the dataset is unfinished or damaged.
        StorageError: the output cannot be written, or is on another file system.
    """
    whole = ShardedDataset.open(folder).manifest
    if SHARE_OPTION in whole.options:
        raise ConfigError("dataset is a part of one", where=str(folder), fix="join the parts first: data merge")
    if not 1 <= count <= len(whole.shards):
        raise ConfigError(
            f"{len(whole.shards)} shards cannot become {count} datasets",
            where=str(folder),
            fix=f"use 1 to {len(whole.shards)}, or prepare with a smaller --max-shard-bytes",
        )
    written = []
    for number, shards in enumerate(_divide(whole.shards, count), start=1):
        share = output.with_name(f"{output.name}-{number}-of-{count}")
        named = [dataclasses.replace(shard, name=f"{index:05d}") for index, shard in enumerate(shards)]
        manifest = dataclasses.replace(
            whole,
            shards=tuple(named),
            documents=sum(shard.counts.samples for shard in shards),
            rejects={},
            notes={},
            rejects_file=None,
            options=whole.options | {"split": {"index": number, "count": count}},
        )
        with dataset_beside(share) as unfinished:
            link_shards([folder / shard.name for shard in shards], named, unfinished)
            save_manifest(manifest, unfinished)
        written.append(share)
    return written


def _divide(shards: Sequence[ShardFacts], count: int) -> Iterator[Sequence[ShardFacts]]:
    """Yield runs of consecutive shards, none empty, each ending nearest to its share of all samples."""
    ends = list(itertools.accumulate(shard.counts.samples for shard in shards))
    first = 0
    for number in range(1, count + 1):
        target = ends[-1] * number / count
        # one shard at least for this run and for each of those after it
        candidates = range(first + 1, len(shards) - (count - number) + 1)
        last = min(candidates, key=lambda end: abs(ends[end - 1] - target))
        yield shards[first:last]
        first = last


def _order_shares(manifests: dict[Path, Manifest]) -> list[Path]:
    """Return the folders by their number.

    Raises:
        ConfigError: not all of them, or not each once.
    """
    shares: dict[Share, Path] = {}
    for folder, manifest in manifests.items():
        option = manifest.options.get(SHARE_OPTION)
        if option is None:
            raise ConfigError(
                "dataset is whole, not a part of one", where=str(folder), fix="list several datasets in data.blend"
            )
        share = Share(option["index"], option["count"])
        if share in shares:
            raise ConfigError(f"part {share} is given twice", where=f"{shares[share]}, {folder}", fix="give it once")
        shares[share] = folder
    counts = {share.count for share in shares}
    if len(counts) > 1:
        raise ConfigError(f"parts are of {sorted(counts)} parts", fix="give the parts of one preparation")
    missing = [str(share) for share in (Share(i + 1, *counts) for i in range(*counts)) if share not in shares]
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(shares) + len(missing)} parts missing: {', '.join(missing[:20])}",
            fix="prepare them, or give their folders",
        )
    return [shares[share] for share in sorted(shares, key=lambda share: share.index)]


def _common_plan(manifests: dict[Path, Manifest]) -> Manifest:
    """Return what all parts were prepared with, as the manifest of a single job begins."""
    plans: dict[Path, Manifest] = {}
    for folder, manifest in manifests.items():
        options = {name: value for name, value in manifest.options.items() if name != SHARE_OPTION}
        plans[folder] = dataclasses.replace(without_content(manifest), options=options)
    first, plan = next(iter(plans.items()))
    for folder, other in plans.items():
        if other != plan:
            raise ConfigError(
                "parts were prepared with different inputs, options or tokenizers",
                where=f"{first}, {folder}",
                fix="prepare one of them again",
            )
    return plan


def _check_rejects(folder: Path, manifest: Manifest) -> None:
    """Compare the list of rejects of a part with its manifest; the shards are checked when they are read.

    Raises:
        DataError: the list is missing or damaged, or the manifest says nothing about it.
    """
    facts = manifest.rejects_file
    fault = "the manifest has no checksum of it" if facts is None else fault_of_file(folder / REJECTS_FILE, facts)
    if fault is not None:
        raise DataError(
            f"part is damaged: {REJECTS_FILE}: {fault}",
            where=str(folder),
            fix="delete the folder of this part and prepare it again",
        )
