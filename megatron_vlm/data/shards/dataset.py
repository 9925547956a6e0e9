"""Indexed binary shards, format version 1: one writer, one reader.

A shard is a plain megatron-core `IndexedDataset` (dtype uint8, multimodal) plus a checksum per sequence;
docs/shard_format.md describes it to the byte. It is written and read here with numpy alone, because the index must
open in milliseconds and because megatron-core never compares an index with its data.
"""

import hashlib
import os
import struct
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_vlm.config import DataError, StorageError
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment
from megatron_vlm.data.shards.manifest import (
    MANIFEST_FILE,
    Counts,
    FileFacts,
    Manifest,
    ShardFacts,
    TokenizerFacts,
    crc32_of_file,
    load_manifest,
    save_manifest,
)
from megatron_vlm.platform.files.durable import flush_to_disk

MODE_TRAINED, MODE_IMAGE, MODE_CONTEXT = 0, 1, 2
TOKEN_DTYPE = np.dtype("<i4")
SUFFIXES = ("bin", "idx", "crc")

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document borders
_MAGIC, _IDX_VERSION, _UINT8_CODE = b"MMIDIDX\x00\x00", 1, 1
_MAX_OPEN_SHARDS = 64  # three file descriptors each; the usual limit of a process is 1024
_WRITE_BUFFER_BYTES = 1 << 20


class ShardWriter:
    """Write one shard, sample by sample, in constant memory per sequence.

    Args:
        prefix: path without suffix; `.bin`, `.idx` and `.crc` are appended. The three are valid only after `close`.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._lengths, self._modes, self._crcs = array("i"), array("b"), array("I")
        self._borders = array("q", [0])
        self._tokens = self._trained = self._images = self._image_bytes = 0
        self.bytes_written = 0
        self._crc = 0
        self._stream = prefix.with_name(prefix.name + ".bin").open("wb", buffering=_WRITE_BUFFER_BYTES)

    def __len__(self) -> int:
        return len(self._borders) - 1

    def add(self, sample: EncodedSample) -> None:
        """Append one sample.

        Raises:
            ValueError: the sample, or one of its segments, is empty.
        """
        if not sample.segments:
            raise ValueError("a sample needs at least one segment")
        for segment in sample.segments:
            if isinstance(segment, ImageSegment):
                content, mode = segment.encoded, MODE_IMAGE
                self._images += 1
                self._image_bytes += len(content)
            else:
                content = np.asarray(segment.input_ids, dtype=TOKEN_DTYPE).tobytes()
                mode = MODE_TRAINED if segment.train else MODE_CONTEXT
                count = len(content) // TOKEN_DTYPE.itemsize
                self._tokens += count
                self._trained += count if segment.train else 0
            if not content:
                raise ValueError("a segment must not be empty")
            self._lengths.append(len(content))
            self._modes.append(mode)
            self._crcs.append(zlib.crc32(content))
            self._crc = zlib.crc32(content, self._crc)
            self._stream.write(content)
            self.bytes_written += len(content)
        self._borders.append(len(self._lengths))

    def close(self, input_name: str = "") -> ShardFacts:
        """Write index and checksums and return what the manifest says about this shard."""
        with self._stream as stream:
            flush_to_disk(stream)
        files = {"bin": FileFacts(bytes=self.bytes_written, crc32=self._crc)}
        files["idx"] = self._write("idx", self._index())
        files["crc"] = self._write("crc", np.array(self._crcs, dtype="<u4").tobytes())
        counts = Counts(
            samples=len(self),
            sequences=len(self._lengths),
            images=self._images,
            image_bytes=self._image_bytes,
            text_tokens=self._tokens,
            trained_tokens=self._trained,
        )
        return ShardFacts(name=self.prefix.name, input=input_name, counts=counts, files=files)

    def discard(self) -> None:
        """Close the data file without making a shard of it."""
        self._stream.close()

    def _index(self) -> bytes:
        lengths = np.array(self._lengths, dtype="<i4")
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        parts = (lengths, pointers, np.array(self._borders, dtype="<i8"), np.array(self._modes, dtype="<i1"))
        header = _HEADER.pack(_MAGIC, _IDX_VERSION, _UINT8_CODE, len(lengths), len(self._borders))
        return header + b"".join(part.tobytes() for part in parts)

    def _write(self, suffix: str, content: bytes) -> FileFacts:
        with self.prefix.with_name(f"{self.prefix.name}.{suffix}").open("wb") as stream:
            stream.write(content)
            flush_to_disk(stream)
        return FileFacts(bytes=len(content), crc32=zlib.crc32(content))


def write_dataset(
    folder: str | Path,
    samples: Iterable[EncodedSample],
    *,
    source: str,
    tokenizer: TokenizerFacts,
    samples_per_shard: int = 1_000_000,
) -> Manifest:
    """Write a complete dataset from samples in memory; `prepare` is the way for raw corpora.

    Raises:
        ValueError: there is no sample.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[ShardFacts] = []
    writer: ShardWriter | None = None
    for sample in samples:
        if writer is None:
            writer = ShardWriter(folder / f"{len(shards):05d}")
        writer.add(sample)
        if len(writer) == samples_per_shard:
            shards.append(writer.close())
            writer = None
    if writer is not None:
        shards.append(writer.close())
    if not shards:
        raise ValueError("a dataset needs at least one sample")
    documents = sum(shard.counts.samples for shard in shards)
    manifest = Manifest(source=source, tokenizer=tokenizer, shards=tuple(shards), documents=documents)
    save_manifest(manifest, folder)
    return manifest


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The memory-mapped index of one shard; no array is copied."""

    lengths: np.ndarray
    """int32[sequences], bytes."""
    pointers: np.ndarray
    """int64[sequences], offset in the data file."""
    borders: np.ndarray
    """int64[samples + 1], first sequence of each sample."""
    modes: np.ndarray
    """int8[sequences], 0 trained text, 1 image, 2 context."""

    @classmethod
    def open(cls, path: Path) -> "ShardIndex":
        """Map an index file.

        Raises:
            DataError: the file is not an index, or shorter or longer than its header says.
        """
        try:
            buffer = np.memmap(path, mode="r", dtype=np.uint8)
            magic, version, code, sequences, borders = _HEADER.unpack(bytes(buffer[: _HEADER.size]))
        except (OSError, ValueError, struct.error) as error:
            raise DataError(f"shard index cannot be read: {error}", where=str(path), fix=_PREPARE_AGAIN) from None
        if (magic, version, code) != (_MAGIC, _IDX_VERSION, _UINT8_CODE):
            raise DataError("file is not a shard index of bytes", where=str(path), fix=_PREPARE_AGAIN)
        expected = _HEADER.size + sequences * (4 + 8 + 1) + borders * 8
        if len(buffer) != expected:
            raise DataError(
                f"shard index has {len(buffer)} bytes, its header says {expected}", where=str(path), fix=_PREPARE_AGAIN
            )
        kinds = (("<i4", sequences), ("<i8", sequences), ("<i8", borders), ("<i1", sequences))
        offsets = _offsets(sequences, borders)
        return cls(*(np.frombuffer(buffer, *kind, offset) for kind, offset in zip(kinds, offsets, strict=True)))

    def num_images(self) -> np.ndarray:
        """Return the images of each sample, int32[samples]."""
        return _sum_between(self.modes == MODE_IMAGE, self.borders)

    def text_lengths(self) -> np.ndarray:
        """Return the text tokens of each sample, int32[samples]."""
        tokens = np.where(self.modes == MODE_IMAGE, 0, self.lengths // TOKEN_DTYPE.itemsize)
        return _sum_between(tokens, self.borders)


def _offsets(sequences: int, borders: int) -> tuple[int, int, int, int]:
    """Return where lengths, pointers, borders and modes begin in an index [bytes]."""
    pointers = _HEADER.size + 4 * sequences
    return _HEADER.size, pointers, pointers + 8 * sequences, pointers + 8 * sequences + 8 * borders


_PREPARE_AGAIN = "prepare the dataset again, or copy it again from where it is whole"


def _sum_between(values: np.ndarray, borders: np.ndarray) -> np.ndarray:
    total = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=total[1:])
    return np.diff(total[borders]).astype(np.int32)


class _OpenShard:
    """File descriptors of one shard in this process.

    All three files are read by pread, not mapped: a file truncated under a mapping kills the process without a
    message, and mapped pages of the index would add up in the memory of every reader.
    """

    def __init__(self, folder: Path, facts: ShardFacts) -> None:
        self.prefix, self.samples = folder / facts.name, facts.counts.samples
        index = self.map_index()
        if (len(index.lengths), len(index.borders) - 1) != (facts.counts.sequences, self.samples):
            raise DataError(
                f"shard index holds {len(index.borders) - 1} samples, the manifest says {self.samples}",
                where=f"{self.prefix}.idx",
                fix=_PREPARE_AGAIN,
            )
        self._offsets = _offsets(facts.counts.sequences, self.samples + 1)
        self._descriptors: dict[str, int] = {}
        for suffix in SUFFIXES:
            self._descriptors[suffix] = os.open(f"{self.prefix}.{suffix}", os.O_RDONLY)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def map_index(self) -> ShardIndex:
        """Return the whole index, for what looks at many samples."""
        return ShardIndex.open(Path(f"{self.prefix}.idx"))

    def read(self, sample: int) -> EncodedSample:
        lengths_at, pointers_at, borders_at, modes_at = self._offsets
        first, last = struct.unpack("<2q", self._pread("idx", 16, borders_at + 8 * sample, sample))
        count = last - first
        lengths = struct.unpack(f"<{count}i", self._pread("idx", 4 * count, lengths_at + 4 * first, sample))
        (pointer,) = struct.unpack("<q", self._pread("idx", 8, pointers_at + 8 * first, sample))
        modes = self._pread("idx", count, modes_at + first, sample)
        crcs = struct.unpack(f"<{count}I", self._pread("crc", 4 * count, 4 * first, sample))
        content = self._pread("bin", sum(lengths), pointer, sample)
        segments: list[TextSegment | ImageSegment] = []
        start = 0
        for length, mode, crc in zip(lengths, modes, crcs, strict=True):
            piece = content[start : start + length]
            start += length
            if zlib.crc32(piece) != crc:
                raise DataError(
                    f"shard is damaged: the checksum of sequence {first + len(segments)} differs",
                    where=f"{self.prefix}.bin sample {sample}",
                    fix=_PREPARE_AGAIN,
                )
            if mode == MODE_IMAGE:
                segments.append(ImageSegment(piece))
            else:
                segments.append(TextSegment(np.frombuffer(piece, dtype=TOKEN_DTYPE), mode == MODE_TRAINED))
        return EncodedSample(tuple(segments))

    def _pread(self, suffix: str, size: int, offset: int, sample: int) -> bytes:
        try:
            content = os.pread(self._descriptors[suffix], size, offset)
        except OSError as error:
            where = f"{self.prefix}.{suffix} sample {sample}"
            raise StorageError(f"shard cannot be read: {error}", where=where) from None
        if len(content) != size:
            raise DataError(
                f"shard is damaged: {size} bytes are expected at byte {offset}, {len(content)} are there",
                where=f"{self.prefix}.{suffix} sample {sample}",
                fix=_PREPARE_AGAIN,
            )
        return content


class ShardedDataset(Sequence[EncodedSample]):
    """A prepared dataset: random access to its samples, every read checked against its checksum.

    Files are opened at the first access in each process, so that an object may be pickled or forked at any time.
    """

    def __init__(self, folder: Path, manifest: Manifest, fingerprint: str) -> None:
        self.folder, self.manifest, self.fingerprint = folder, manifest, fingerprint
        self._ends = np.cumsum([shard.counts.samples for shard in manifest.shards], dtype=np.int64)
        self._open_shards: OrderedDict[int, _OpenShard] = OrderedDict()
        self._checked: set[int] = set()

    @classmethod
    def open(cls, path: str | Path) -> "ShardedDataset":
        """Open the folder that `prepare` wrote.

        Raises:
            DataError: a file is missing, or has another size than the manifest says (truncated, stale, swapped).
        """
        folder = Path(path)
        manifest = load_manifest(folder)
        for shard in manifest.shards:
            for suffix in SUFFIXES:
                _check_size(folder / f"{shard.name}.{suffix}", shard.files[suffix].bytes)
        fingerprint = hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()
        return cls(folder, manifest, fingerprint)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, sample: int) -> EncodedSample:  # type: ignore[override]
        sample = int(sample)
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of a dataset of {len(self)}")
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        start = int(self._ends[shard - 1]) if shard else 0
        return self._shard(shard).read(sample - start)

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "manifest": self.manifest, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def num_images(self) -> np.ndarray:
        """Images of each sample, int32[samples], from the index files alone."""
        return self._lengths[0]

    @property
    def text_lengths(self) -> np.ndarray:
        """Text tokens of each sample, int32[samples], from the index files alone."""
        return self._lengths[1]

    def outlines(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the segments of some samples, from the index files alone.

        Args:
            samples: int[n]; ascending.

        Returns:
            Borders int64[n + 1] of each sample's segments in the two others; whether each segment is an image, bool[m];
            and its tokens, int32[m], 0 for images.

        Raises:
            DataError: an index is damaged.
        """
        sizes, images, tokens = [np.zeros(1, dtype=np.int64)], [np.zeros(0, dtype=bool)], [np.zeros(0, dtype=np.int32)]
        shards = np.searchsorted(self._ends, samples, side="right")
        for number in np.unique(shards):
            index = self._shard(int(number)).map_index()
            own = samples[shards == number] - (self._ends[number - 1] if number else 0)
            sizes.append(index.borders[own + 1] - index.borders[own])
            ends = np.cumsum(sizes[-1])
            segments = np.arange(ends[-1]) + np.repeat(index.borders[own] - (ends - sizes[-1]), sizes[-1])
            images.append(index.modes[segments] == MODE_IMAGE)
            tokens.append(np.where(images[-1], 0, index.lengths[segments] // TOKEN_DTYPE.itemsize))
        return np.cumsum(np.concatenate(sizes)), np.concatenate(images), np.concatenate(tokens)

    def check_tokenizer(self, tokenizer: TokenizerFacts) -> None:
        """Refuse token ids of another tokenizer.

        Raises:
            DataError: the dataset was prepared with a tokenizer of another sha256.
        """
        own = self.manifest.tokenizer
        if own.sha256 != tokenizer.sha256:
            raise DataError(
                f"shards were prepared with tokenizer {own.name} (sha256 {own.sha256[:12]}, {own.vocab_size} pieces), "
                f"not with {tokenizer.name} (sha256 {tokenizer.sha256[:12]}, {tokenizer.vocab_size} pieces)",
                where=str(self.folder),
                fix="set the tokenizer of the shards, or prepare them again",
            )

    @cached_property
    def _lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and text tokens of each sample."""
        images, tokens = [], []
        for number, shard in enumerate(self.manifest.shards):
            self._check_index(number)
            index = ShardIndex.open(self.folder / f"{shard.name}.idx")
            images.append(index.num_images())
            tokens.append(index.text_lengths())
        empty = np.zeros(0, dtype=np.int32)
        return np.concatenate([empty, *images]), np.concatenate([empty, *tokens])

    def _check_index(self, number: int) -> None:
        """Check an index against the manifest, once in each process."""
        if number in self._checked:
            return
        facts = self.manifest.shards[number]
        path = self.folder / f"{facts.name}.idx"
        if crc32_of_file(path) != facts.files["idx"].crc32:
            raise DataError("shard index is damaged: its checksum differs", where=str(path), fix=_PREPARE_AGAIN)
        self._checked.add(number)

    def _shard(self, number: int) -> _OpenShard:
        shard = self._open_shards.get(number)
        if shard is None:
            self._check_index(number)
            shard = self._open_shards[number] = _OpenShard(self.folder, self.manifest.shards[number])
            if len(self._open_shards) > _MAX_OPEN_SHARDS:
                self._open_shards.popitem(last=False)
        else:
            self._open_shards.move_to_end(number)
        return shard


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise DataError("shard file is missing", where=str(path), fix=_PREPARE_AGAIN) from None
    if found != expected:
        kind = "truncated" if found < expected else "not the one it was prepared with"
        raise DataError(
            f"shard file is {kind}: {found} bytes, the manifest says {expected}", where=str(path), fix=_PREPARE_AGAIN
        )
