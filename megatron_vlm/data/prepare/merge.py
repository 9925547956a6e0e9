"""Join the shares that the jobs of an array have prepared into one dataset, and divide a dataset, copying no shard.

The shards are hard links: the result is an ordinary dataset, to the byte the one that a single job would have written,
so that no reader needs to know of parts; and the parts may be deleted afterwards. References in the manifest would
have made every reader follow them, and a moved or deleted part would break the whole.
"""

import dataclasses
import functools
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.config import ConfigError, DataError, StorageError
from megatron_vlm.data.files.img2dataset import TableFile
from megatron_vlm.data.files.locations import Location, parse_location, place_of
from megatron_vlm.data.prepare.deduplicate import drop_repeats
from megatron_vlm.data.prepare.joining import check_not_empty, check_part_files, join_facts, missing_rows
from megatron_vlm.data.prepare.part import load_used_rows
from megatron_vlm.data.prepare.share import SHARE_OPTION, Share
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.manifest import (
    MANIFEST_FILE,
    REJECTS_FILE,
    SUFFIXES,
    Manifest,
    ShardFacts,
    load_manifest,
    save_manifest,
    without_content,
)
from megatron_vlm.data.tasks.processes import run_tasks
from megatron_vlm.platform.files.durable import folder_beside

_UNIQUE = ".unique"


def merge_datasets(
    output: Path, folders: Sequence[Path], *, tables: Sequence[Location] = (), num_workers: int = 1
) -> Manifest:
    """Join all shares of one preparation, in any order, into the dataset that one job would have written.

    Args:
        output: new folder on the file system of the parts; left alone if it holds this very dataset.
        folders: what `prepare --part 1/N` to `N/N` wrote.
        tables: where the parquet tables are now that pairs were joined with, if they have moved or their URLs have to
            be signed; none: where they were.
        num_workers: processes that write the shards again that have duplicates, where these are to be dropped.

    Returns:
        The manifest of the whole.

    Raises:
        ConfigError: a part is missing, given twice or of another preparation; a joined table is not among those given;
            or the output folder is not empty.
        DataError: a part is unfinished or damaged, a joined table has changed, or no document became a sample.
        StorageError: the output cannot be written, or is on another file system.
    """
    if not folders:
        raise ConfigError("no part is given", fix="give the folders that prepare --part wrote")
    manifests = {folder: ShardedDataset.open(folder).manifest for folder in folders}
    ordered = _order_shares(manifests)
    plan = _common_plan({folder: manifests[folder] for folder in ordered})
    for folder in ordered:
        check_part_files(folder, manifests[folder])
    joined = _open_tables(manifests[ordered[0]], tables)
    num_rows = sum(table.num_rows for table in joined)
    used_rows = [load_used_rows(folder, num_rows) for folder in ordered] if joined else []
    pieces: Sequence[Any] = [manifests[folder] for folder in ordered]
    sources = [folder / shard.name for folder in ordered for shard in manifests[folder].shards]
    duplicates = None
    with _written_beside(output) as unfinished:
        if kind := plan.options.get("drop_duplicates"):
            run = functools.partial(run_tasks, num_workers=num_workers)
            work = unfinished / _UNIQUE
            unique = drop_repeats(pieces, ordered, kind=kind, tokenizer=plan.tokenizer, work=work, run=run)
            pieces, sources, duplicates = unique.pieces, unique.sources, unique.rows
        missing = missing_rows(joined, list(plan.options.get("tables", ())), used_rows)
        manifest = join_facts(plan, pieces, ordered, unfinished / REJECTS_FILE, missing, duplicates)
        check_not_empty(manifest, ordered[0] / REJECTS_FILE)
        _link_shards(sources, manifest.shards, unfinished)
        shutil.rmtree(unfinished / _UNIQUE, ignore_errors=True)
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
        with _written_beside(share) as unfinished:
            _link_shards([folder / shard.name for shard in shards], named, unfinished)
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


def _open_tables(manifest: Manifest, given: Sequence[Location]) -> tuple[TableFile, ...]:
    """Open the parquet tables that the pairs were joined with; rows without an image in any part are rejects.

    Raises:
        ConfigError: tables are given, and one of them is missing or there twice.
        DataError: a table cannot be read, or has changed.
        StorageError: it is at a URL and cannot be read.
    """
    recorded: dict[str, int] = manifest.options[SHARE_OPTION]["tables"]
    places = _find_tables(list(recorded), given) if given else {name: parse_location(name) for name in recorded}
    tables = []
    for name, num_rows in recorded.items():
        place = places[name]
        try:
            table = TableFile.open(place)
        except (DataError, StorageError) as error:
            fix = "check it, or say where the table is now with --tables"
            raise type(error)(error.what, where=error.where, fix=fix) from None
        if table.num_rows != num_rows:
            raise DataError(
                f"table has {table.num_rows} rows, had {num_rows}", where=name, fix="prepare all parts again"
            )
        tables.append(table)
    return tuple(tables)


def _find_tables(names: Sequence[str], given: Sequence[Location]) -> dict[str, Location]:
    """Return for each table that the parts were joined with the given one whose path ends most alike.

    Those that are most alike are settled first, so that "sub/x.parquet" does not stand in the way of "x.parquet".

    Raises:
        ConfigError: there is none, or two are as much alike, or one is it for two names.
    """
    alike = np.array([[_common_end(parse_location(name), table) for table in given] for name in names])
    found: dict[str, Location] = {}
    while len(found) < len(names):
        name, table = divmod(int(alike.argmax()), len(given))
        best = alike[name, table]
        number = max(np.count_nonzero(line == best) for line in (alike[name], alike[:, table])) if best else 0
        if number != 1:
            raise ConfigError(
                f"{number} of the {len(given)} --tables are that table of the parts",
                where=names[name],
                fix="give each of these tables once, with as much of its old path as tells it apart",
            )
        found[names[name]] = given[table]
        alike[:, table] = 0
        alike[name] = -1
    return found


def _common_end(first: Location, second: Location) -> int:
    """Return how many parts at the end of two paths are equal."""
    pairs = zip(reversed(place_of(first).parts), reversed(place_of(second).parts), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


class _AlreadyThereError(Exception):
    """The output holds what was to be written."""


@contextmanager
def _written_beside(output: Path) -> Iterator[Path]:
    """Give a folder that becomes `output` when all is written; nothing changes if `output` is already the same.

    Raises:
        ConfigError: the output folder holds something else, or another process writes it.
        StorageError: it cannot be written.
    """
    try:
        with suppress(_AlreadyThereError), folder_beside(output) as unfinished:
            yield unfinished
            if output.is_dir() and any(output.iterdir()):
                _check_same(output, load_manifest(unfinished))
                raise _AlreadyThereError
    except OSError as error:
        raise StorageError(
            f"dataset cannot be written: {error.strerror or error}",
            where=str(error.filename2 or error.filename or output),
            fix="give an output folder on the file system of the input, where hard links are allowed",
        ) from error


def _check_same(output: Path, manifest: Manifest) -> None:
    if not (output / MANIFEST_FILE).exists() or ShardedDataset.open(output).manifest != manifest:
        raise ConfigError("output folder holds something else", where=str(output), fix="give another, or delete it")


def _link_shards(sources: Sequence[Path], shards: Sequence[ShardFacts], output: Path) -> None:
    for source, shard in zip(sources, shards, strict=True):
        for suffix in SUFFIXES:
            os.link(source.with_name(f"{source.name}.{suffix}"), output / f"{shard.name}.{suffix}")
