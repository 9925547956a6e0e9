"""Read prepared shards, format version 1, with random access; every read is compared with its checksum.

A shard is a plain megatron-core `IndexedDataset` (dtype uint8, multimodal) plus a checksum of each sequence and the
size of each image; docs/shard_format.md describes every byte. Plain numpy reads it, because megatron-core never
compares an index with its data.
"""

import hashlib
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_vlm.config import DataError, StorageError
from megatron_vlm.data.samples import EncodedSample, ImageSegment, Outlines, TextSegment, TokenizerFacts
from megatron_vlm.data.shards.index import (
    MODE_IMAGE,
    MODE_TRAINED,
    PREPARE_AGAIN,
    SIZE_DTYPE,
    TOKEN_DTYPE,
    IndexOffsets,
    ShardIndex,
)
from megatron_vlm.data.shards.manifest import (
    MANIFEST_FILE,
    SUFFIXES,
    Manifest,
    ShardFacts,
    crc32_of_file,
    load_manifest,
)

_NAMES = {"idx": "shard index", "dim": "file of image sizes"}
_SIZE_BYTES = 2 * SIZE_DTYPE.itemsize
_IMAGE_BLOCK = 4096  # sequences between two places for which the number of earlier images is known
_MAX_OPEN_SHARDS = 64  # four file descriptors each; the usual limit of a process is 1024


class _OpenShard:
    """The open files of one shard in this process.

    All files are read with pread, not mapped: truncating a mapped file kills the process without a message, and mapped
    pages of the index would accumulate in the memory of every reader.
    """

    def __init__(self, folder: Path, facts: ShardFacts, images_before: np.ndarray) -> None:
        self._images_before = images_before
        self.prefix = folder / facts.name
        sequences, samples = facts.counts.sequences, facts.counts.samples
        index = self.map_index()
        if (len(index.lengths), len(index.borders) - 1) != (sequences, samples):
            what = f"shard index holds {len(index.borders) - 1} samples, but the manifest says {samples}"
            raise DataError(what, where=f"{self.prefix}.idx", fix=PREPARE_AGAIN)
        self._offsets = IndexOffsets.of(sequences, samples + 1)
        self._descriptors: dict[str, int] = {}
        for suffix in SUFFIXES:
            self._descriptors[suffix] = os.open(f"{self.prefix}.{suffix}", os.O_RDONLY)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def map_index(self) -> ShardIndex:
        """Return the whole index, for code that looks at many samples."""
        return ShardIndex.open(Path(f"{self.prefix}.idx"))

    def read(self, sample: int, *, keeps_damaged_images: bool = False) -> EncodedSample:
        offsets = self._offsets
        first, last = struct.unpack("<2q", self._pread("idx", 16, offsets.borders + 8 * sample, sample))
        count = last - first
        lengths = struct.unpack(f"<{count}i", self._pread("idx", 4 * count, offsets.lengths + 4 * first, sample))
        (pointer,) = struct.unpack("<q", self._pread("idx", 8, offsets.pointers + 8 * first, sample))
        modes, sizes = self._read_images(first, count, sample)
        crcs = struct.unpack(f"<{count}I", self._pread("crc", 4 * count, 4 * first, sample))
        content = self._pread("bin", sum(lengths), pointer, sample)
        segments: list[TextSegment | ImageSegment] = []
        start = 0
        for length, mode, crc in zip(lengths, modes, crcs, strict=True):
            sequence = content[start : start + length]
            start += length
            fault = None
            if zlib.crc32(sequence) != crc:
                fault = f"shard is damaged: the checksum of sequence {first + len(segments)} differs"
                if mode != MODE_IMAGE or not keeps_damaged_images:
                    raise DataError(fault, where=f"{self.prefix}.bin sample {sample}", fix=PREPARE_AGAIN)
            if mode == MODE_IMAGE:
                segments.append(ImageSegment(sequence, next(sizes), fault))
            else:
                segments.append(TextSegment(np.frombuffer(sequence, dtype=TOKEN_DTYPE), mode == MODE_TRAINED))
        return EncodedSample(tuple(segments))

    def _read_images(self, first: int, count: int, sample: int) -> tuple[bytes, Iterator[tuple[int, int]]]:
        """Return the modes of consecutive sequences and the sizes of the images among them."""
        block = first // _IMAGE_BLOCK
        start = block * _IMAGE_BLOCK
        modes = self._pread("idx", first - start + count, self._offsets.modes + start, sample)
        modes, before = modes[first - start :], modes[: first - start].count(MODE_IMAGE)
        if not (number := modes.count(MODE_IMAGE)):
            return modes, iter(())
        offset = _SIZE_BYTES * (int(self._images_before[block]) + before)
        return modes, struct.iter_unpack("<2H", self._pread("dim", _SIZE_BYTES * number, offset, sample))

    def _pread(self, suffix: str, size: int, offset: int, sample: int) -> bytes:
        where = f"{self.prefix}.{suffix} sample {sample}"
        try:
            content = os.pread(self._descriptors[suffix], size, offset)
        except OSError as error:
            fix = "check the disk or the network, then run the same command again"
            raise StorageError(f"shard cannot be read: {error}", where=where, fix=fix) from None
        if len(content) != size:
            what = f"shard is damaged: expected {size} bytes at byte {offset}, found {len(content)}"
            raise DataError(what, where=where, fix=PREPARE_AGAIN)
        return content


class ShardedDataset(Sequence[EncodedSample]):
    """A prepared dataset: random access to its samples, with every read compared with its checksum.

    Each process opens files on first access, so the object may be pickled or forked at any time.
    """

    def __init__(self, folder: Path, manifest: Manifest, fingerprint: str) -> None:
        self.folder, self.manifest, self.fingerprint = folder, manifest, fingerprint
        self._borders = np.cumsum([0, *(shard.counts.samples for shard in manifest.shards)], dtype=np.int64)
        self._open_shards: dict[int, _OpenShard] = {}  # the most recently used ones last
        self._checked: set[tuple[int, str]] = set()
        self._images_before: dict[int, np.ndarray] = {}

    @classmethod
    def open(cls, path: str | Path) -> "ShardedDataset":
        """Open the folder that `prepare` wrote.

        Raises:
            DataError: a file is missing, or its size is not the one in the manifest (truncated, stale or swapped).
        """
        folder = Path(path)
        manifest = load_manifest(folder)
        for shard in manifest.shards:
            for suffix in SUFFIXES:
                _check_size(folder / f"{shard.name}.{suffix}", shard.files[suffix].bytes)
        fingerprint = hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()
        return cls(folder, manifest, fingerprint)

    def __len__(self) -> int:
        return int(self._borders[-1])

    def __getitem__(self, sample: int) -> EncodedSample:  # type: ignore[override]
        return self.read(sample)

    def read(self, sample: int, *, keeps_damaged_images: bool = False) -> EncodedSample:
        """Return a sample.

        Args:
            sample: its index.
            keeps_damaged_images: return images whose checksum differs, too; their `fault` says so.

        Raises:
            DataError: it is damaged.
            IndexError: there is no such sample.
        """
        sample = int(sample)
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of a dataset of {len(self)}")
        shard, place = self._locate(sample)
        return self._shard(shard).read(place, keeps_damaged_images=keeps_damaged_images)

    def __reduce__(self) -> tuple:
        return ShardedDataset, (self.folder, self.manifest, self.fingerprint)

    def describe(self, sample: int) -> str:
        """Name the shard of a sample and its place there, for error messages."""
        shard, place = self._locate(sample)
        return f"{self.folder}/{self.manifest.shards[shard].name}.bin sample {place}"

    @property
    def num_images(self) -> np.ndarray:
        """Number of images of each sample, int32[samples]; only index files are read."""
        return self._lengths[0]

    @property
    def text_lengths(self) -> np.ndarray:
        """Number of text tokens of each sample, int32[samples]; only index files are read."""
        return self._lengths[1]

    def outlines(self, samples: np.ndarray) -> Outlines:
        """Return the segments of some samples, int[n] and ascending; only index files are read.

        Raises:
            DataError: an index is damaged.
        """
        sizes, modes, tokens = (
            [np.zeros(1, dtype=np.int64)],
            [np.zeros(0, dtype=np.int8)],
            [np.zeros(0, dtype=np.int32)],
        )
        for number, own in self._by_shard(samples):
            index = self._shard(number).map_index()
            sizes.append(index.borders[own + 1] - index.borders[own])
            segments = _ranges(index.borders[own], index.borders[own + 1])
            modes.append(index.modes[segments])
            tokens.append(np.where(modes[-1] == MODE_IMAGE, 0, index.lengths[segments] // TOKEN_DTYPE.itemsize))
        mode = np.concatenate(modes)
        return Outlines(
            np.cumsum(np.concatenate(sizes)), mode == MODE_IMAGE, mode == MODE_TRAINED, np.concatenate(tokens)
        )

    def image_sizes(self, samples: np.ndarray | None = None) -> np.ndarray:
        """Return the width and height of the images of some samples in reading order, uint16[images, 2] [pixels].

        Args:
            samples: int[n]; ascending. None: all samples.

        Raises:
            DataError: an index or a file of image sizes is damaged.
        """
        found = [np.zeros((0, 2), dtype=SIZE_DTYPE)]
        if samples is None:
            return np.concatenate(found + [self._sizes(number) for number in range(len(self.manifest.shards))])
        for number, own in self._by_shard(samples):
            borders = self._shard(number).map_index().image_borders()
            found.append(self._sizes(number)[_ranges(borders[own], borders[own + 1])])
        return np.concatenate(found)

    def check_tokenizer(self, tokenizer: TokenizerFacts) -> None:
        """Check that the token ids are those of a tokenizer.

        Raises:
            DataError: the dataset was prepared with another tokenizer, by sha256.
        """
        own = self.manifest.tokenizer
        if own.sha256 != tokenizer.sha256:
            raise DataError(
                f"shards were prepared with tokenizer {own.name} (sha256 {own.sha256[:12]}, {own.vocab_size} pieces), "
                f"not with {tokenizer.name} (sha256 {tokenizer.sha256[:12]}, {tokenizer.vocab_size} pieces)",
                where=str(self.folder),
                fix="use the tokenizer of the shards, or prepare them again",
            )

    def _locate(self, sample: int) -> tuple[int, int]:
        """Return the shard of a sample and its place there."""
        shard = int(np.searchsorted(self._borders, sample, side="right")) - 1
        return shard, sample - int(self._borders[shard])

    def _by_shard(self, samples: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each shard that holds some of the samples, and their places there."""
        shards = np.searchsorted(self._borders, samples, side="right") - 1
        for number in np.unique(shards).tolist():
            yield number, samples[shards == number] - self._borders[number]

    @cached_property
    def _lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and text tokens of each sample."""
        images, tokens = ([np.zeros(0, dtype=np.int32)] for _ in range(2))
        for number, shard in enumerate(self.manifest.shards):
            self._check_file(number, "idx")
            index = ShardIndex.open(self.folder / f"{shard.name}.idx")
            images.append(index.num_images())
            tokens.append(index.text_lengths())
        return np.concatenate(images), np.concatenate(tokens)

    def _sizes(self, number: int) -> np.ndarray:
        """Map the image sizes of a shard, uint16[images, 2]."""
        facts = self.manifest.shards[number]
        self._check_file(number, "dim")
        path = self.folder / f"{facts.name}.dim"
        if facts.files["dim"].bytes != _SIZE_BYTES * facts.counts.images:
            what = f"file of image sizes has {facts.files['dim'].bytes} bytes for {facts.counts.images} images"
            raise DataError(what, where=str(path), fix=PREPARE_AGAIN)
        if not facts.counts.images:  # an empty file cannot be mapped
            return np.zeros((0, 2), dtype=SIZE_DTYPE)
        return np.memmap(path, mode="r", dtype=SIZE_DTYPE).reshape(-1, 2)

    def _check_file(self, number: int, suffix: str) -> None:
        """Compare a file of a shard with its checksum in the manifest, once in each process."""
        if (number, suffix) in self._checked:
            return
        facts = self.manifest.shards[number]
        path = self.folder / f"{facts.name}.{suffix}"
        if crc32_of_file(path) != facts.files[suffix].crc32:
            raise DataError(f"{_NAMES[suffix]} is damaged: its checksum differs", where=str(path), fix=PREPARE_AGAIN)
        self._checked.add((number, suffix))

    def _shard(self, number: int) -> _OpenShard:
        shard = self._open_shards.pop(number, None) or self._open_shard(number)
        self._open_shards[number] = shard
        if len(self._open_shards) > _MAX_OPEN_SHARDS:
            del self._open_shards[next(iter(self._open_shards))]
        return shard

    def _open_shard(self, number: int) -> _OpenShard:
        self._check_file(number, "idx")
        self._check_file(number, "dim")
        facts = self.manifest.shards[number]
        if number not in self._images_before:
            # Kept after the shard is closed, because counting takes a pass over the index.
            # Block by block, since one array for all of them would stay in the memory of every reader.
            modes = ShardIndex.open(self.folder / f"{facts.name}.idx").modes
            blocks = (modes[start : start + _IMAGE_BLOCK] for start in range(0, len(modes), _IMAGE_BLOCK))
            counts = [block.tobytes().count(MODE_IMAGE) for block in blocks]
            self._images_before[number] = np.cumsum([0, *counts])
        return _OpenShard(self.folder, facts, self._images_before[number])


def _ranges(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return first[0] to last[0] - 1, first[1] to last[1] - 1, and so on."""
    sizes = last - first
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - sizes), sizes)


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise DataError("shard file is missing", where=str(path), fix=PREPARE_AGAIN) from None
    if found != expected:
        kind = "truncated" if found < expected else "not the one that was prepared"
        what = f"shard file is {kind}: {found} bytes, but the manifest says {expected}"
        raise DataError(what, where=str(path), fix=PREPARE_AGAIN)


def sizes_by_name(datasets: Sequence[ShardedDataset]) -> dict[str, int]:
    """Return the samples under each name: one dataset counts once, and parts of a split one together."""
    sizes: Counter[str] = Counter()
    for dataset in {dataset.fingerprint: dataset for dataset in datasets}.values():
        sizes[dataset.manifest.dataset_name] += len(dataset)
    return dict(sizes)
