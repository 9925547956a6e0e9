"""Rows found by a text, for joins of millions of rows: sorted 64-bit hashes on disk, mapped by every worker."""

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
    """What is found under each hash; any dtype, [n]."""


class JoinIndex:
    """Finds rows by text.

    Args:
        folder: where `save_join_index` put it.
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
    """Return uint64[n]: 64 bits of BLAKE2b, a chance of 2e-5 that any two of 25 million texts meet."""
    return np.fromiter(map(_hash, texts), dtype="<u8", count=len(texts))


def save_join_index(parts: Iterable[JoinRows], folder: Path) -> None:
    """Write the rows of all input files, sorted; equal hashes stay in the order of the files."""
    parts = list(parts)
    hashes = np.concatenate([part.hashes for part in parts])
    order = np.argsort(hashes, kind="stable")
    folder.mkdir(exist_ok=True)
    np.save(folder / _HASHES, hashes[order])
    np.save(folder / _VALUES, np.concatenate([part.values for part in parts])[order])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
