"""Find rows among millions by a text: sorted 64-bit hashes on disk, mapped by every worker."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

_ROWS = "rows.npy"


class JoinIndex:
    """Finds rows by text, in a folder written by `save_join_index`."""

    def __init__(self, folder: Path) -> None:
        rows = np.load(folder / _ROWS, mmap_mode="r")
        self._hashes, self._values = rows["hash"].view(np.ndarray), rows["value"]

    def find(self, text: str) -> np.ndarray:
        """Return the values under `text`, in the order of the input files."""
        wanted = np.uint64(_hash(text))
        first, last = (self._hashes.searchsorted(wanted, side) for side in ("left", "right"))
        return self._values[first:last]


def join_rows(texts: Sequence[str], values: np.ndarray) -> np.ndarray:
    """Return the rows of one input file, [n] of (hash, value): a value, of any dtype, for each text.

    A hash is 64 bits of BLAKE2b. Among 25 million texts, two share a hash with probability 2e-5.
    """
    # Aligned: searching unaligned hashes would copy all of them.
    dtype = np.dtype([("hash", "<u8"), ("value", values.dtype)], align=True)
    rows = np.empty(len(texts), dtype=dtype)
    rows["hash"], rows["value"] = [_hash(text) for text in texts], values
    return rows


def save_join_index(rows: Iterable[np.ndarray], folder: Path) -> None:
    """Write the rows of all input files, sorted by hash; rows with equal hashes stay in the order of the files."""
    joined = np.concatenate(list(rows))
    folder.mkdir(exist_ok=True)
    np.save(folder / _ROWS, joined[np.argsort(joined["hash"], kind="stable")])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
