"""Prepare one input file: its documents become one shard or more, and a list of rejects.

Everything that `prepare` writes goes through `prepare_part`, whoever calls it: this process, a pool, a job array. A
part depends on its input file and the options alone, is written beside its place and renamed into it when it is whole.
"""

import dataclasses
import errno
import functools
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.config.prepare import MAX_SHARD_BYTES, ImageRules, Recipe
from megatron_vlm.data.documents import VARIANTS, Document, join_text
from megatron_vlm.data.files.locations import Location, RemoteFile
from megatron_vlm.data.rejects import RejectError, reject_row
from megatron_vlm.data.samples import EncodedSample
from megatron_vlm.data.shards.manifest import REJECTS_FILE, ShardFacts
from megatron_vlm.data.shards.writer import ShardWriter
from megatron_vlm.data.sources.image_store import FolderImages, ImageReader, ImageStore, RemoteImages, TarImages
from megatron_vlm.data.sources.source import Found, Source
from megatron_vlm.data.tasks.processes import Report
from megatron_vlm.data.text.encoding import encode_document
from megatron_vlm.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_vlm.platform.files.durable import flush_to_disk, storage_errors, write_durably

PART_FILE = "part.json"
_REPORT_EVERY = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePlace:
    """Where images are found by name."""

    folder: Location | None = None
    tars: tuple[Location, ...] = ()
    """Tars instead of a folder."""
    index: Path | None = None
    """Where `prepare` put the index of the tars."""

    def open(self, max_bytes: int) -> ImageStore | None:
        """Open the place in this process."""
        if self.tars and self.index is not None:
            return TarImages(self.tars, self.index, max_bytes=max_bytes)
        if isinstance(self.folder, RemoteFile):
            return RemoteImages(self.folder, max_bytes=max_bytes)
        return FolderImages(self.folder, max_bytes=max_bytes) if self.folder else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartJob:
    """What the preparation of every input file has in common; small, since it travels with each task."""

    source: Source
    recipe: Recipe
    tokenizer: Path
    images: ImagePlace = ImagePlace()
    image_rules: ImageRules = ImageRules()
    max_shard_bytes: int = MAX_SHARD_BYTES
    """A shard that reaches this size is followed by another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFacts:
    """What became of one input file."""

    input: str
    documents: int
    rejects: dict[str, int]
    notes: dict[str, int]
    shards: tuple[ShardFacts, ...]


def prepare_part(job: PartJob, path: Location, name: str, folder: Path, report: Report) -> PartFacts:
    """Prepare one input file into `folder`, or read what is there if that was done before.

    Args:
        job: the options.
        path: the input file.
        name: what it is called in the manifest and among the rejects.
        folder: the part's own folder; it exists only when it is whole.
        report: is told about progress.

    Raises:
        StorageError: a file cannot be read or written.
    """
    if folder.exists():
        return load_part(folder)
    with built_beside(folder, f"preparation of {name}") as unfinished:
        return _write_part(job, path, name, unfinished, report)


@contextmanager
def built_beside(folder: Path, what: str) -> Iterator[Path]:
    """Give a folder that becomes `folder` when all is written; several processes, also of several nodes, may try.

    Raises:
        StorageError: a file cannot be read or written; `what` names the work.
    """
    unfinished = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    with storage_errors(f"{what} stopped", folder, kept="finished input files are kept"):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        try:
            unfinished.rename(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            shutil.rmtree(unfinished)  # whoever was faster wrote the same bytes


def discard(unfinished: Path) -> None:
    """Remove what an interrupted `built_beside` left, even if a process on another node still writes to it."""
    # Under another name it cannot become whole any more, whatever is removed when.
    gone = unfinished.with_name(unfinished.name + ".gone")
    shutil.rmtree(gone, ignore_errors=True)
    unfinished.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def load_part(folder: Path) -> PartFacts:
    """Read what a finished part says about itself."""
    tree = json.loads((folder / PART_FILE).read_bytes())
    shards = tuple(ShardFacts.from_tree(shard) for shard in tree.pop("shards"))
    return PartFacts(**tree, shards=shards)


def _write_part(job: PartJob, path: Location, name: str, folder: Path, report: Report) -> PartFacts:
    images = ImageReader(job.images.open(job.image_rules.max_bytes), job.image_rules)
    tokenizer = _tokenizer(job.tokenizer)
    shards = _ShardSeries(folder, name, job.max_shard_bytes)
    rejects: Counter[str] = Counter()
    documents = reported_rejects = 0
    with (folder / REJECTS_FILE).open("w") as log:
        for documents, found in enumerate(job.source.read(path, images), start=1):
            samples = _samples(found, job.recipe, tokenizer)
            if isinstance(samples, RejectError):
                rejects[samples.reason] += 1
                log.write(reject_row(name, found.line, found.key, samples))
            else:
                for sample in samples:
                    shards.add(sample)
            if documents % _REPORT_EVERY == 0:
                report(_REPORT_EVERY, sum(rejects.values()) - reported_rejects)
                reported_rejects = sum(rejects.values())
        flush_to_disk(log)
    report(documents % _REPORT_EVERY, sum(rejects.values()) - reported_rejects)
    facts = PartFacts(
        input=name,
        documents=documents,
        rejects=dict(sorted(rejects.items())),
        notes={note: count for note, count in sorted(images.notes.items()) if count},
        shards=tuple(shards.close()),
    )
    write_durably(folder / PART_FILE, json.dumps(dataclasses.asdict(facts)).encode())
    return facts


def _samples(found: Found, recipe: Recipe, tokenizer: Tokenizer) -> list[EncodedSample] | RejectError:
    """Return the samples of a document: all of them, or why there are none."""
    if isinstance(found.document, RejectError):
        return found.document
    try:
        return list(_encode(found.document, recipe, tokenizer))
    except RejectError as error:
        return error


def _encode(document: Document, recipe: Recipe, tokenizer: Tokenizer) -> Iterator[EncodedSample]:
    documents = VARIANTS[recipe.variant](document)
    if not documents:
        raise RejectError("variant_empty", f"variant {recipe.variant} leaves nothing of the document")
    for variant in documents:
        joined = join_text(variant, recipe.join) if recipe.join else variant
        yield encode_document(joined, tokenizer, bos=recipe.bos, eos=recipe.eos)


class _ShardSeries:
    """Consecutive shards of one input file."""

    def __init__(self, folder: Path, input_name: str, max_bytes: int) -> None:
        self._folder, self._input, self._max_bytes = folder, input_name, max_bytes
        self._finished: list[ShardFacts] = []
        self._writer: ShardWriter | None = None

    def add(self, sample: EncodedSample) -> None:
        if self._writer is None:
            self._writer = ShardWriter(self._folder / f"{len(self._finished):05d}")
        self._writer.add(sample)
        if self._writer.bytes_written >= self._max_bytes:
            self.close()

    def close(self) -> list[ShardFacts]:
        if self._writer is not None:
            self._finished.append(self._writer.close(self._input))
            self._writer = None
        return self._finished


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(path)
