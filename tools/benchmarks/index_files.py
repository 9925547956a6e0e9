"""Datasets of real indexes and sparse data files: planned and opened like any other, but small on disk.

They follow docs/shard_format.md. The holes of a data file read as zeros, so with `readable` every sample can be read:
texts of token 0 and images of 2,000 zero bytes, with correct checksums.
"""

import zlib
from pathlib import Path

import numpy as np

from megatron_vlm.data.samples import TokenizerFacts
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.index import MODE_IMAGE, MODE_TRAINED
from megatron_vlm.data.shards.manifest import Counts, FileFacts, Manifest, ShardFacts, save_manifest

_SAMPLES_PER_SHARD = 100_000
_IMAGE_BYTES, _READABLE_IMAGE_BYTES = 30_000, 2_000  # reads fill the page cache
_IMAGE_SIZE = (640, 480)
_TOKENIZER = TokenizerFacts(name="none", sha256="0" * 64, vocab_size=32000, bos_id=1, eos_id=2)


def write_indexes(folder: Path, images: np.ndarray, text: np.ndarray, *, readable: bool = False) -> ShardedDataset:
    """Write a dataset with the given numbers of images and text tokens per sample.

    Args:
        folder: a new folder.
        images: int[samples].
        text: int[samples].
        readable: write checksums, so that samples can be read.
    """
    folder.mkdir(parents=True)
    shards = []
    for number, first in enumerate(range(0, len(images), _SAMPLES_PER_SHARD)):
        rows = slice(first, first + _SAMPLES_PER_SHARD)
        shards.append(_write_shard(folder, f"{number:05d}", images[rows], text[rows], readable))
    manifest = Manifest(dataset_name=folder.name, tokenizer=_TOKENIZER, shards=tuple(shards), documents=len(images))
    save_manifest(manifest, folder)
    return ShardedDataset.open(folder)


def _write_shard(folder: Path, name: str, images: np.ndarray, text: np.ndarray, readable: bool) -> ShardFacts:
    """Write a shard whose samples start with one token; each image is followed by a stretch of the text."""
    sequences = 1 + 2 * images.astype(np.int64)
    borders = np.concatenate([[0], np.cumsum(sequences)])
    place = np.arange(borders[-1]) - np.repeat(borders[:-1], sequences)
    is_image = place % 2 == 1
    stretch = np.repeat(np.maximum((text - 1) // images, 1), sequences)
    tokens = np.where(place == 0, 1, np.where(place == np.repeat(sequences - 1, sequences), 0, stretch))
    used = np.add.reduceat(np.where(is_image, 0, tokens), borders[:-1])
    tokens[borders[1:] - 1] = np.maximum(text - used, 1)
    image_bytes = _READABLE_IMAGE_BYTES if readable else _IMAGE_BYTES
    lengths = np.where(is_image, image_bytes, tokens * 4).astype("<i4")
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]).astype("<i8")
    header = b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + b"\x01"
    header += np.array([len(lengths), len(borders)], "<u8").tobytes()
    modes = np.where(is_image, MODE_IMAGE, MODE_TRAINED).astype("<i1")
    index = header + b"".join(array.tobytes() for array in (lengths, pointers, borders.astype("<i8"), modes))
    (folder / f"{name}.idx").write_bytes(index)
    sizes = {"bin": int(lengths.sum(dtype=np.int64)), "crc": 4 * len(lengths)}
    for suffix, size in sizes.items():
        with (folder / f"{name}.{suffix}").open("wb") as stream:
            stream.truncate(size)
    if readable:
        distinct, kind = np.unique(lengths, return_inverse=True)
        crcs = np.array([zlib.crc32(bytes(length)) for length in distinct.tolist()], dtype="<u4")
        (folder / f"{name}.crc").write_bytes(crcs[kind].tobytes())
    dim = np.tile(np.array(_IMAGE_SIZE, "<u2"), int(images.sum())).tobytes()
    (folder / f"{name}.dim").write_bytes(dim)
    files = {suffix: FileFacts(bytes=size, crc32=0) for suffix, size in sizes.items()}
    files["dim"] = FileFacts(bytes=len(dim), crc32=zlib.crc32(dim))
    files["idx"] = FileFacts(bytes=len(index), crc32=zlib.crc32(index))
    counts = Counts(samples=len(images), sequences=len(lengths), images=int(images.sum()))
    return ShardFacts(name=name, input=name, counts=counts, files=files)
