"""Write shards, sample by sample; a shard is valid once its writer is closed."""

import itertools
import zlib
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_vlm.data.images.checking import MAX_SIDE
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TokenizerFacts
from megatron_vlm.data.shards.index import (
    MODE_CONTEXT,
    MODE_IMAGE,
    MODE_TRAINED,
    SIZE_DTYPE,
    TOKEN_DTYPE,
    count_sequences,
    pack_index,
)
from megatron_vlm.data.shards.manifest import FileFacts, Manifest, ShardFacts, save_manifest
from megatron_vlm.platform.files.durable import flush_to_disk

_WRITE_BUFFER_BYTES = 1 << 20


class ShardWriter:
    """Write one shard; only a few bytes of each sequence stay in memory.

    Args:
        prefix: path without suffix; `.bin`, `.idx`, `.crc` and `.dim` are appended. The files are valid only after
            `close`.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._lengths, self._modes, self._crcs = array("i"), array("b"), array("I")
        self._sizes = array("H")
        self._borders = array("q", [0])
        self.bytes_written = 0
        self._crc = 0
        self._stream = prefix.with_name(prefix.name + ".bin").open("wb", buffering=_WRITE_BUFFER_BYTES)

    def __len__(self) -> int:
        return len(self._borders) - 1

    def add(self, sample: EncodedSample) -> None:
        """Append one sample.

        Raises:
            ValueError: the sample or one of its segments is empty, or the size of an image is unknown or too large.
        """
        if not sample.segments:
            raise ValueError("a sample needs at least one segment")
        for segment in sample.segments:
            if isinstance(segment, ImageSegment):
                content, mode = segment.encoded, MODE_IMAGE
                self._sizes.extend(_checked(segment.size))
            else:
                content = np.asarray(segment.input_ids, dtype=TOKEN_DTYPE).tobytes()
                mode = MODE_TRAINED if segment.train else MODE_CONTEXT
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
        """Write the index, the checksums and the image sizes, and return what the manifest says about the shard."""
        with self._stream as stream:
            flush_to_disk(stream)
        files = {"bin": FileFacts(bytes=self.bytes_written, crc32=self._crc)}
        files["idx"] = self._write("idx", pack_index(self._lengths, self._modes, self._borders))
        files["crc"] = self._write("crc", np.array(self._crcs, dtype="<u4").tobytes())
        files["dim"] = self._write("dim", np.array(self._sizes, dtype=SIZE_DTYPE).tobytes())
        counts = count_sequences(np.array(self._lengths), np.array(self._modes), len(self))
        return ShardFacts(name=self.prefix.name, input=input_name, counts=counts, files=files)

    def _write(self, suffix: str, content: bytes) -> FileFacts:
        with self.prefix.with_name(f"{self.prefix.name}.{suffix}").open("wb") as stream:
            stream.write(content)
            flush_to_disk(stream)
        return FileFacts(bytes=len(content), crc32=zlib.crc32(content))


def _checked(size: tuple[int, int] | None) -> tuple[int, int]:
    if size is None or not 1 <= min(size) <= max(size) <= MAX_SIDE:
        raise ValueError(f"an image needs its width and height, each 1 to {MAX_SIDE} pixels, not {size}")
    return size


def write_dataset(
    folder: str | Path,
    samples: Iterable[EncodedSample],
    *,
    dataset_name: str,
    tokenizer: TokenizerFacts,
    samples_per_shard: int = 1_000_000,
) -> Manifest:
    """Write a complete dataset from samples in memory; for raw corpora, use `prepare`.

    Raises:
        ValueError: there is no sample.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[ShardFacts] = []
    rest = iter(samples)
    for first in rest:
        writer = ShardWriter(folder / f"{len(shards):05d}")
        for sample in itertools.chain([first], itertools.islice(rest, samples_per_shard - 1)):
            writer.add(sample)
        shards.append(writer.close())
    if not shards:
        raise ValueError("a dataset needs at least one sample")
    documents = sum(shard.counts.samples for shard in shards)
    manifest = Manifest(dataset_name=dataset_name, tokenizer=tokenizer, shards=tuple(shards), documents=documents)
    save_manifest(manifest, folder)
    return manifest
