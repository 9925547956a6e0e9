"""Prepare one input file: its documents become a chunk of the dataset, one or more shards and a list of rejects.

Everything that `prepare` writes goes through `prepare_chunk`, in this process, in a pool or in a job array. A chunk
depends only on its input file and the options. It is written beside its place and renamed when it is complete.
"""

import dataclasses
import functools
import json
from collections import Counter
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
from megatron_vlm.data.sources.source import Source
from megatron_vlm.data.tasks.processes import Report
from megatron_vlm.data.text.encoding import encode_document
from megatron_vlm.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_vlm.platform.files.durable import flush_to_disk, folder_once, storage_errors, write_durably

CHUNK_FILE = "chunk.json"
_REPORT_EVERY = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePlace:
    """Where images are found by name."""

    folder: Location | None = None
    tars: tuple[Location, ...] = ()
    """Tars to use instead of a folder."""
    index: Path | None = None
    """Folder in which `prepare` keeps the index of the tars."""

    def open(self, max_bytes: int) -> ImageStore | None:
        """Open the place in this process."""
        if self.tars and self.index is not None:
            return TarImages(self.tars, self.index, max_bytes=max_bytes)
        if isinstance(self.folder, RemoteFile):
            return RemoteImages(self.folder, max_bytes=max_bytes)
        return FolderImages(self.folder, max_bytes=max_bytes) if self.folder else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkJob:
    """What the preparation of every input file has in common; small, since it travels with each task."""

    source: Source
    recipe: Recipe
    tokenizer: Path
    images: ImagePlace = ImagePlace()
    image_rules: ImageRules = ImageRules()
    max_shard_bytes: int = MAX_SHARD_BYTES
    """A shard that reaches this size is followed by another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkFacts:
    """What became of one input file."""

    input: str
    documents: int
    rejects: dict[str, int]
    notes: dict[str, int]
    shards: tuple[ShardFacts, ...]


def prepare_chunk(job: ChunkJob, path: Location, name: str, folder: Path, report: Report) -> ChunkFacts:
    """Prepare one input file into `folder`; if the folder exists already, read its facts.

    Args:
        job: the options.
        path: the input file.
        name: its name in the manifest and in the list of rejects.
        folder: of the chunk; it exists only when the chunk is complete.
        report: is told about progress.

    Raises:
        StorageError: a file cannot be read or written.
    """
    if folder.exists():
        return load_chunk(folder)
    with storage_errors(f"preparation of {name} stopped", folder, kept="finished input files are kept"):
        with folder_once(folder) as unfinished:
            return _write_chunk(job, path, name, unfinished, report)


def load_chunk(folder: Path) -> ChunkFacts:
    """Read the facts of a finished chunk."""
    tree = json.loads((folder / CHUNK_FILE).read_bytes())
    shards = tuple(ShardFacts.from_tree(shard) for shard in tree.pop("shards"))
    return ChunkFacts(**tree, shards=shards)


def _write_chunk(job: ChunkJob, path: Location, name: str, folder: Path, report: Report) -> ChunkFacts:
    images = ImageReader(job.images.open(job.image_rules.max_bytes), job.image_rules)
    tokenizer = load_tokenizer_once(job.tokenizer)
    shards = _ShardSeries(folder, name, job.max_shard_bytes)
    rejects: Counter[str] = Counter()
    documents = reported_rejects = 0
    with (folder / REJECTS_FILE).open("w") as log:
        for documents, found in enumerate(job.source.read(path, images), start=1):
            try:
                for sample in _encode(found.document, job.recipe, tokenizer):
                    shards.add(sample)
            except RejectError as error:
                rejects[error.reason] += 1
                log.write(reject_row(name, found.line, found.key, error))
            if documents % _REPORT_EVERY == 0:
                report(_REPORT_EVERY, sum(rejects.values()) - reported_rejects)
                reported_rejects = sum(rejects.values())
        flush_to_disk(log)
    report(documents % _REPORT_EVERY, sum(rejects.values()) - reported_rejects)
    facts = ChunkFacts(
        input=name,
        documents=documents,
        rejects=dict(sorted(rejects.items())),
        notes={note: count for note, count in sorted(images.notes.items()) if count},
        shards=tuple(shards.close()),
    )
    write_durably(folder / CHUNK_FILE, json.dumps(dataclasses.asdict(facts)).encode())
    return facts


def _encode(document: Document | RejectError, recipe: Recipe, tokenizer: Tokenizer) -> list[EncodedSample]:
    """Return all samples of a document, or raise the RejectError that says why there are none."""
    if isinstance(document, RejectError):
        raise document
    documents = VARIANTS[recipe.variant](document)
    if not documents:
        raise RejectError("variant_empty", f"variant {recipe.variant} leaves nothing of the document")
    if recipe.join:
        documents = [join_text(variant, recipe.join) for variant in documents]
    return [encode_document(variant, tokenizer, bos=recipe.bos, eos=recipe.eos) for variant in documents]


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


load_tokenizer_once = functools.lru_cache(maxsize=1)(load_tokenizer)
"""`load_tokenizer`, once per process: Llama 3's takes seconds."""
