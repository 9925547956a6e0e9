"""Find rows among millions by a text: sorted 64-bit hashes on disk, mapped by every worker."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

_HASHES, _VALUES = "hashes.npy", "values.npy"


class JoinRows(NamedTuple):
    """Rows of one input file, unsorted."""

    hashes: np.ndarray
    """uint64[n]."""
    values: np.ndarray
    """The value of each hash; any dtype, [n]."""


class JoinIndex:
    """Finds rows by text.

    Args:
        folder: folder written by `save_join_index`.
    """

    def __init__(self, folder: Path) -> None:
        self._hashes = np.load(folder / _HASHES, mmap_mode="r")
        self._values = np.load(folder / _VALUES, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, text: str) -> np.ndarray:
        """Return the values under `text`, in the order of the input files."""
        wanted = np.uint64(_hash(text))
        first = int(np.searchsorted(self._hashes, wanted))
        last = first
        while last < len(self._hashes) and self._hashes[last] == wanted:
            last += 1
        return self._values[first:last]


def hash_texts(texts: Sequence[str]) -> np.ndarray:
    """Return uint64[n]: 64 bits of BLAKE2b. Among 25 million texts, two share a hash with probability 2e-5."""
    return np.fromiter(map(_hash, texts), dtype="<u8", count=len(texts))


def save_join_index(rows: Iterable[JoinRows], folder: Path) -> None:
    """Write the rows of all input files, sorted by hash; rows with equal hashes stay in the order of the files."""
    rows = list(rows)
    hashes = np.concatenate([one.hashes for one in rows])
    order = np.argsort(hashes, kind="stable")
    folder.mkdir(exist_ok=True)
    np.save(folder / _HASHES, hashes[order])
    np.save(folder / _VALUES, np.concatenate([one.values for one in rows])[order])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
