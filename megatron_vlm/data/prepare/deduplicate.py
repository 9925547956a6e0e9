"""Leave out what repeats an earlier sample, over all parts of a dataset, before they are joined.

A shard without repeats stays as it is; of the others a copy is written that lacks them. The first of equal samples, in
the order of the input files, stays: which one that is does not depend on workers or parts.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_vlm.data.prepare.duplicates import Fingerprints, find_repeats
from megatron_vlm.data.prepare.part import PartFacts, built_beside
from megatron_vlm.data.rejects import RejectError, reject_row
from megatron_vlm.data.samples import TokenizerFacts
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.manifest import Manifest, ShardFacts
from megatron_vlm.data.shards.writer import ShardWriter
from megatron_vlm.data.tasks.processes import Engine
from megatron_vlm.platform.files.durable import write_durably

_REASON, _NOTE = "duplicate", "duplicate_samples"
_ROWS_FILE, _FACTS_FILE, _SHARD_NAME = "duplicates.jsonl", "shard.json", "00000"
_Piece = PartFacts | Manifest
_SAYS = {"documents": "repeats", "images": "has the images of"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Unique:
    """The pieces of a dataset without what repeats."""

    pieces: list[_Piece]
    sources: list[Path]
    """Where each shard of the pieces, in order, is now: path without suffix."""
    rows: Path
    """One line for the list of rejects of each document that is left out."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """A shard of which something stays."""

    source: Path
    facts: ShardFacts
    gone: np.ndarray
    """int64[n], its samples that go, ascending."""


def drop_repeats(
    pieces: Sequence[_Piece],
    folders: Sequence[Path],
    *,
    kind: str,
    tokenizer: TokenizerFacts,
    work: Path,
    run: Engine,
) -> Unique:
    """Leave out every sample that repeats an earlier one; goes on where an earlier call was interrupted.

    A document all of whose samples repeat others is a reject. One that keeps a sample is none; what it loses is
    counted in the notes.

    Args:
        pieces: what `prepare_part` made of each input file, or the shares of a dataset; in order.
        folders: of the pieces.
        kind: one of `duplicates.KINDS`.
        tokenizer: of the pieces.
        work: folder for the shards that are written again.
        run: runs the tasks that write them.

    Raises:
        DataError: fingerprints are missing or damaged, or a shard is.
        StorageError: a shard cannot be written.
    """
    work.mkdir(exist_ok=True)
    fingerprints = Fingerprints(folders, [sum(shard.counts.samples for shard in piece.shards) for piece in pieces])
    repeats = find_repeats(fingerprints)
    shrunk: list[_Piece] = []
    kept: list[_Kept] = []
    with (work / _ROWS_FILE).open("w") as rows:
        for number, (piece, folder) in enumerate(zip(pieces, folders, strict=True)):
            start, end = fingerprints.start(number), int(fingerprints.ends[number])
            first, last = np.searchsorted(repeats.samples, [start, end])
            gone = repeats.samples[first:last] - start
            documents, others = _documents_gone(fingerprints.records(number)["origin"], gone)
            for place in documents:
                rows.write(_row(fingerprints, start + int(gone[place]), int(repeats.originals[first + place]), kind))
            own = _shards_kept(piece, folder, gone)
            kept += own
            shrunk.append(_without(piece, own, len(documents), others))
    sources, written = _write_rests(kept, tokenizer, work, run)
    return Unique(pieces=_with_shards(shrunk, written), sources=sources, rows=work / _ROWS_FILE)


def write_rest(
    source: Path, facts: ShardFacts, tokenizer: TokenizerFacts, gone: np.ndarray, target: Path
) -> ShardFacts:
    """Write a shard again without some of its samples, or read what is there if that was done before.

    Args:
        source: path of the shard without suffix.
        facts: of the shard.
        tokenizer: of the shard.
        gone: int64[n]; the samples to leave out; not all.
        target: folder for the shard; it exists only when it is whole.

    Returns:
        The new shard's facts.
    """
    if not target.exists():
        with built_beside(target, "removal of duplicates") as folder:
            manifest = Manifest(source="", tokenizer=tokenizer, shards=(facts,), documents=0)
            samples = ShardedDataset(source.parent, manifest, fingerprint="")
            writer = ShardWriter(folder / _SHARD_NAME)
            for sample in np.delete(np.arange(len(samples)), gone):
                writer.add(samples[int(sample)])
            content = json.dumps(dataclasses.asdict(writer.close(facts.input)))
            write_durably(folder / _FACTS_FILE, content.encode())
    return ShardFacts.from_tree(json.loads((target / _FACTS_FILE).read_bytes()))


def _documents_gone(origins: np.ndarray, gone: np.ndarray) -> tuple[np.ndarray, int]:
    """Return which of `gone` are the first samples of documents that lose all, and how many are not of such documents.

    Args:
        origins: int64[samples]; equal for neighbours of one document.
        gone: int64[n]; ascending.
    """
    if len(gone) == 0:
        return gone, 0
    document = np.cumsum(np.diff(origins, prepend=origins[:1]) != 0)
    touched, first, losses = np.unique(document[gone], return_index=True, return_counts=True)
    whole = losses == np.bincount(document)[touched]
    return first[whole], int(losses[~whole].sum())


def _row(fingerprints: Fingerprints, sample: int, original: int, kind: str) -> str:
    (file, line, key), (*place, first_key) = fingerprints.origin(sample), fingerprints.origin(original)
    what = f"{_SAYS[kind]} {place[0]}"
    what += f" line {place[1]}" if place[1] is not None else ""
    what += f" key {first_key}" if first_key is not None else ""
    return reject_row(file, line, key, RejectError(_REASON, what))


def _shards_kept(piece: _Piece, folder: Path, gone: np.ndarray) -> list[_Kept]:
    kept = []
    start = 0
    for shard in piece.shards:
        first, last = np.searchsorted(gone, [start, start + shard.counts.samples])
        if last - first < shard.counts.samples:
            kept.append(_Kept(folder / shard.name, shard, gone[first:last] - start))
        start += shard.counts.samples
    return kept


def _without(piece: _Piece, kept: list[_Kept], documents: int, others: int) -> _Piece:
    rejects = piece.rejects | ({_REASON: documents} if documents else {})
    notes = piece.notes | ({_NOTE: others} if others else {})
    return dataclasses.replace(piece, shards=tuple(shard.facts for shard in kept), rejects=rejects, notes=notes)


def _write_rests(
    kept: list[_Kept], tokenizer: TokenizerFacts, work: Path, run: Engine
) -> tuple[list[Path], list[ShardFacts]]:
    """Write the shards that lose something; returns where each one is, and what it holds."""
    sources, facts = [shard.source for shard in kept], [shard.facts for shard in kept]
    touched = [number for number, shard in enumerate(kept) if len(shard.gone)]
    tasks = [(sources[n], facts[n], tokenizer, kept[n].gone, work / f"{n:05d}") for n in touched]
    for number, task, written in zip(touched, tasks, run(write_rest, tasks, unit="shards"), strict=True):
        facts[number] = written
        sources[number] = task[-1] / _SHARD_NAME
    return sources, facts


def _with_shards(pieces: list[_Piece], shards: list[ShardFacts]) -> list[_Piece]:
    changed = []
    start = 0
    for piece in pieces:
        end = start + len(piece.shards)
        changed.append(dataclasses.replace(piece, shards=tuple(shards[start:end])))
        start = end
    return changed
