"""The record of the samples that each iteration consumed."""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_vlm.config import DataError, StorageError
from megatron_vlm.data.plan.plan import Plan

logger = logging.getLogger(__name__)

_INDEX_FILE = "iterations.jsonl"
_IDS_FILE = "sample_ids.bin"
_ID_DTYPE = np.dtype("<i8")


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One iteration."""

    iteration: int
    """Counted from 1."""
    samples: int
    sample_ids_sha: str
    """Hash of the samples that the ranks consumed; see `row_hash`."""
    plan: str
    """Hash of the plan."""


@dataclass(frozen=True, slots=True)
class RecordedBatch:
    """What the ledger has of one iteration."""

    entry: LedgerEntry
    sample_ids: np.ndarray
    """int64[samples], row by row."""


def read_iteration(folder: str | Path, iteration: int) -> RecordedBatch | None:
    """Return what a ledger recorded of an iteration, counted from 1; None if it is not there.

    Raises:
        DataError: the ledger is damaged.
    """
    folder, before = Path(folder), 0
    try:
        content = (folder / _INDEX_FILE).read_bytes()
    except FileNotFoundError:
        return None
    for entry, _ in _entries(content, folder):
        if entry.iteration == iteration:
            with (folder / _IDS_FILE).open("rb") as stream:
                stream.seek(before * _ID_DTYPE.itemsize)
                ids = stream.read(entry.samples * _ID_DTYPE.itemsize)
            if len(ids) < entry.samples * _ID_DTYPE.itemsize:
                raise _damaged(folder, f"{_IDS_FILE} has fewer ids than {_INDEX_FILE} says")
            return RecordedBatch(entry, np.frombuffer(ids, dtype=_ID_DTYPE).astype(np.int64))
        before += entry.samples
    return None


class Ledger:
    """Append one entry per iteration; written by one rank, after all ranks compared what they consumed with the plan.

    `sample_ids.bin` holds little-endian int64 ids, as the plan counts them (fragments of long samples have their own;
    see `Plan.fragments`), `iterations.jsonl` one `LedgerEntry` a line.

    Args:
        folder: `<run>/ledger`.
        plan: where the ids come from.
        start_iteration: iterations already done; later entries belong to lost steps and are removed.

    Raises:
        DataError: the ledger is damaged.
        StorageError: it cannot be written.
    """

    def __init__(self, folder: str | Path, plan: Plan, start_iteration: int = 0) -> None:
        self.folder, self.plan = Path(folder), plan
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._ids_file, self._index = (self._open(name) for name in (_IDS_FILE, _INDEX_FILE))
            self._cut(start_iteration)
        except OSError as error:
            raise self._storage_error(error) from None
        self._last = start_iteration

    def record(self, iteration: int, sample_ids_sha: str) -> None:
        """Append the iteration just done, counted from 1, with the hash of the samples that the ranks consumed.

        Raises:
            ValueError: another iteration is due.
            StorageError: the entry cannot be written.
        """
        if iteration != self._last + 1:
            raise ValueError(f"iteration {iteration} recorded after {self._last}")
        ids = self.plan.sample_ids(iteration - 1)
        entry = LedgerEntry(iteration, len(ids), sample_ids_sha, self.plan.hash)
        try:
            # Ids first: a line in the index guarantees that its ids are there.
            self._ids_file.write(ids.astype(_ID_DTYPE).tobytes())
            self._index.write(json.dumps(asdict(entry)).encode() + b"\n")
        except OSError as error:
            raise self._storage_error(error) from None
        self._last = iteration

    def close(self) -> None:
        """Close the files."""
        self._ids_file.close()
        self._index.close()

    def _open(self, name: str) -> BinaryIO:
        # Unbuffered: a record is in the file even if the process is killed.
        return os.fdopen(os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)

    def _cut(self, start_iteration: int) -> None:
        entries = _entries(self._index.read(), self.folder)
        kept = list(takewhile(lambda found: found[0].iteration <= start_iteration, entries))
        last = kept[-1][0].iteration if kept else 0
        if last < start_iteration:
            logger.warning("%s has no entries of iterations %d to %d", self.folder, last + 1, start_iteration)
        size_of_ids = sum(entry.samples for entry, _ in kept) * _ID_DTYPE.itemsize
        if self._ids_file.seek(0, os.SEEK_END) < size_of_ids:
            raise _damaged(self.folder, f"{_IDS_FILE} has fewer ids than {_INDEX_FILE} says")
        for file, size in ((self._ids_file, size_of_ids), (self._index, sum(len(line) for _, line in kept))):
            file.truncate(size)
            file.seek(size)

    def _storage_error(self, error: OSError) -> StorageError:
        return StorageError(f"ledger cannot be written: {error}", where=str(self.folder), fix="make room there")


def _entries(content: bytes, folder: Path) -> Iterator[tuple[LedgerEntry, bytes]]:
    """Yield each entry of the index with its line."""
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break  # a kill during the write left a line without its end
        yield _parse(line, folder), line


def _parse(line: bytes, folder: Path) -> LedgerEntry:
    try:
        return LedgerEntry(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        raise _damaged(folder, f"line {line[:40]!r} of {_INDEX_FILE} is not an entry") from None


def _damaged(folder: Path, what: str) -> DataError:
    return DataError(f"ledger is damaged: {what}", where=str(folder), fix="move the folder away to start a new one")
