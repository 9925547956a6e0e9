"""Make one dataset of finished pieces: the parts of `prepare`, or the datasets of a job array."""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_vlm.config import DataError
from megatron_vlm.data.files.img2dataset import TableFile
from megatron_vlm.data.prepare.duplicates import FILES
from megatron_vlm.data.prepare.part import PREPARE_AGAIN, USED_ROWS_FILE, PartFacts
from megatron_vlm.data.prepare.share import SHARE_OPTION
from megatron_vlm.data.rejects import describe_rejects, reject_row
from megatron_vlm.data.shards.manifest import REJECTS_FILE, Manifest, ShardFacts, facts_of_file, fault_of_file
from megatron_vlm.data.sources.pairs.source import TarPairSource
from megatron_vlm.platform.files.durable import open_durably


def number_shards(pieces: Sequence[PartFacts | Manifest]) -> list[ShardFacts]:
    """Return the shards of all pieces, numbered through."""
    shards = [shard for piece in pieces for shard in piece.shards]
    return [dataclasses.replace(shard, name=f"{number:05d}") for number, shard in enumerate(shards)]


def join_facts(
    plan: Manifest,
    pieces: Sequence[PartFacts | Manifest],
    folders: Sequence[Path],
    rejects: Path,
    missing: Iterator[str],
    duplicates: Path | None = None,
) -> Manifest:
    """Write the list of rejects of all pieces and return the manifest of the whole; may be done again.

    Args:
        plan: what was known before any data was read.
        pieces: in order.
        folders: of the pieces.
        rejects: where the list goes.
        missing: more rows of the list, each a rejected document that no piece has counted.
        duplicates: file of more rows, each of a rejected document that its piece has counted.
    """
    reasons, notes = Counter[str](), Counter[str]()
    for piece in pieces:
        reasons.update(piece.rejects)
        notes.update(piece.notes)
    lists = [folder / REJECTS_FILE for folder in folders] + ([duplicates] if duplicates else [])
    num_missing = _write_rejects(rejects, lists, missing)
    if num_missing:
        reasons["image_missing"] += num_missing
    return dataclasses.replace(
        plan,
        shards=tuple(number_shards(pieces)),
        documents=sum(piece.documents for piece in pieces) + num_missing,
        rejects=dict(sorted(reasons.items())),
        notes=dict(sorted(notes.items())),
        rejects_file=facts_of_file(rejects),
    )


def missing_rows(tables: tuple[TableFile, ...], names: Sequence[str], used_rows: Sequence[np.ndarray]) -> Iterator[str]:
    """Yield a reject for each row of the joined tables that no piece has an image for.

    Args:
        tables: all tables, in the order they were indexed in.
        names: of the tables, as in the manifest.
        used_rows: int64[n] of each piece.
    """
    named = {table.path: name for table, name in zip(tables, names, strict=True)}
    used = np.zeros(sum(table.num_rows for table in tables), dtype=bool)
    for rows in used_rows:
        used[rows] = True
    for path, found in TarPairSource((), tables=tables).missing(used):
        if isinstance(found.document, DataError):
            yield reject_row(named[path], found.line, found.key, found.document)


def files_of_part(manifest: Manifest) -> tuple[str, ...]:
    """Return what a part has for `data merge` besides its shards and its rejects."""
    used_rows = (USED_ROWS_FILE,) if manifest.options[SHARE_OPTION]["tables"] else ()
    return used_rows + (FILES if manifest.options.get("drop_duplicates") else ())


def check_part_files(folder: Path, manifest: Manifest) -> None:
    """Hold what of a part is read when parts are joined, its shards aside, against its manifest.

    Raises:
        DataError: a file is missing or damaged, or the manifest says nothing about it.
    """
    known = {REJECTS_FILE: manifest.rejects_file, **manifest.part_files}
    for name in (REJECTS_FILE, *files_of_part(manifest)):
        facts = known.get(name)
        fault = "the manifest has no checksum of it" if facts is None else fault_of_file(folder / name, facts)
        if fault is not None:
            raise DataError(f"part is damaged: {name}: {fault}", where=str(folder), fix=PREPARE_AGAIN)


def check_not_empty(manifest: Manifest, where: Path) -> None:
    """Refuse a dataset without a sample.

    Raises:
        DataError: no document became a sample.
    """
    if not manifest.shards:
        raise DataError(
            f"none of {manifest.documents} documents became a sample: "
            f"{describe_rejects(manifest.rejects) or 'the input is empty'}",
            where=str(where),
            fix="look at the rejects, then delete the folder and try with other options",
        )


def _write_rejects(path: Path, lists: Sequence[Path], missing: Iterator[str]) -> int:
    """Put the lists of rejects together; returns how many `missing` adds."""
    count = 0
    with open_durably(path) as stream:
        for rows in lists:
            with rows.open("rb") as own:
                shutil.copyfileobj(own, stream)
        for count, row in enumerate(missing, start=1):  # noqa: B007
            stream.write(row.encode())
    return count
