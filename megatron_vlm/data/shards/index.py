"""The index of a shard: where each sequence and each sample begins; docs/shard_format.md describes every byte.

Plain numpy writes and reads it, because it must open in milliseconds.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_vlm.config import DataError
from megatron_vlm.data.shards.manifest import Counts

MODE_TRAINED, MODE_IMAGE, MODE_CONTEXT = 0, 1, 2
TOKEN_DTYPE = np.dtype("<i4")
SIZE_DTYPE = np.dtype("<u2")
PREPARE_AGAIN = "prepare the dataset again, or copy it again from an intact copy"

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document borders
_MAGIC, _IDX_VERSION, _UINT8_CODE = b"MMIDIDX\x00\x00", 1, 1


def pack_index(lengths: Sequence[int], modes: Sequence[int], borders: Sequence[int]) -> bytes:
    """Return the content of an index file.

    Args:
        lengths: of each sequence [bytes].
        modes: of each sequence.
        borders: first sequence of each sample, and the number of sequences.
    """
    sizes = np.array(lengths, dtype="<i4")
    pointers = np.zeros(len(sizes), dtype="<i8")
    np.cumsum(sizes[:-1], dtype=np.int64, out=pointers[1:])
    arrays = (sizes, pointers, np.array(borders, dtype="<i8"), np.array(modes, dtype="<i1"))
    header = _HEADER.pack(_MAGIC, _IDX_VERSION, _UINT8_CODE, len(sizes), len(borders))
    return header + b"".join(array.tobytes() for array in arrays)


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The index of one shard, memory-mapped without copying an array."""

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
            DataError: the file is not an index, or its length is not the one its header says.
        """
        try:
            buffer = np.memmap(path, mode="r", dtype=np.uint8)
            magic, version, code, sequences, borders = _HEADER.unpack(bytes(buffer[: _HEADER.size]))
        except (OSError, ValueError, struct.error) as error:
            raise DataError(f"shard index cannot be read: {error}", where=str(path), fix=PREPARE_AGAIN) from None
        if (magic, version, code) != (_MAGIC, _IDX_VERSION, _UINT8_CODE):
            raise DataError("file is not the index of a shard", where=str(path), fix=PREPARE_AGAIN)
        expected = _HEADER.size + sequences * (4 + 8 + 1) + borders * 8
        if len(buffer) != expected:
            what = f"shard index has {len(buffer)} bytes, not {expected} as its header says"
            raise DataError(what, where=str(path), fix=PREPARE_AGAIN)
        kinds = (("<i4", sequences), ("<i8", sequences), ("<i8", borders), ("<i1", sequences))
        offsets = IndexOffsets.of(sequences, borders)
        return cls(*(np.frombuffer(buffer, *kind, offset) for kind, offset in zip(kinds, offsets, strict=True)))

    def num_images(self) -> np.ndarray:
        """Return the number of images of each sample, int32[samples]."""
        return _sum_between(self.modes == MODE_IMAGE, self.borders)

    def image_borders(self) -> np.ndarray:
        """Return where the images of each sample begin among those of the shard, int64[samples + 1]."""
        return np.concatenate([[0], np.cumsum(self.num_images(), dtype=np.int64)])

    def text_lengths(self) -> np.ndarray:
        """Return the number of text tokens of each sample, int32[samples]."""
        tokens = np.where(self.modes == MODE_IMAGE, 0, self.lengths // TOKEN_DTYPE.itemsize)
        return _sum_between(tokens, self.borders)


class IndexOffsets(NamedTuple):
    """Where the arrays of an index file begin [bytes]."""

    lengths: int
    pointers: int
    borders: int
    modes: int

    @classmethod
    def of(cls, sequences: int, borders: int) -> "IndexOffsets":
        """Return the offsets for an index of this many sequences and sample borders."""
        pointers = _HEADER.size + 4 * sequences
        return cls(_HEADER.size, pointers, pointers + 8 * sequences, pointers + 8 * sequences + 8 * borders)


def count_sequences(lengths: np.ndarray, modes: np.ndarray, num_samples: int) -> Counts:
    """Count what sequences hold.

    Args:
        lengths: int[sequences] [bytes].
        modes: int8[sequences].
        num_samples: samples that the sequences belong to.
    """
    is_image = modes == MODE_IMAGE
    tokens = lengths.astype(np.int64) // TOKEN_DTYPE.itemsize
    return Counts(
        samples=num_samples,
        sequences=len(lengths),
        images=int(is_image.sum()),
        image_bytes=int(lengths[is_image].sum(dtype=np.int64)),
        text_tokens=int(tokens[~is_image].sum()),
        trained_tokens=int(tokens[modes == MODE_TRAINED].sum()),
    )


def _sum_between(values: np.ndarray, borders: np.ndarray) -> np.ndarray:
    total = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=total[1:])
    return np.diff(total[borders]).astype(np.int32)
