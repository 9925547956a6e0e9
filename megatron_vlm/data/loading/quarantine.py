"""Samples to leave out: `data.quarantine` names a file of their ids.

The plan stays as it is, and so do the rows and the hash of what was consumed. A sample that is left out keeps its place
among the samples of its row, but is not read and takes no position: the row ends earlier and is filled with padding.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_vlm.config import ConfigError, DataError, StorageError
from megatron_vlm.data.plan.plan import Plan

_MAX_SHOWN = 40


@dataclass(frozen=True, slots=True)
class Quarantine:
    """The samples to leave out."""

    ids: frozenset[int] = frozenset()
    """As the plan counts them."""
    sha256: str = ""
    """Of the file."""

    def count(self, plan: Plan, iteration: int) -> int:
        """Return how many samples of a global batch are left out."""
        return int(np.isin(plan.sample_ids(iteration), list(self.ids)).sum()) if self.ids else 0


def check_quarantine(path: str) -> None:
    """Check a file of ids as far as that can be done without a plan.

    Raises:
        ConfigError: there is no such file, or it may not be read.
        DataError: a line is no id; names file and line.
        StorageError: the file cannot be read.
    """
    for _ in _read_ids(_read(path), path):
        pass


def read_quarantine(path: str, plan: Plan) -> Quarantine:
    """Read a file of ids, one a line; empty lines, and what follows a `#`, do not count.

    Args:
        path: of the file.
        plan: counts the ids: those of the ledger.

    Raises:
        ConfigError: as for `check_quarantine`.
        DataError: a line is no id of the plan; names file and line.
        StorageError: the file cannot be read.
    """
    content, ids = _read(path), set()
    for number, text in _read_ids(content, path):
        if len(text) > len(str(plan.num_ids)) or int(text) >= plan.num_ids:
            raise DataError(
                f"there is no sample {text[:_MAX_SHOWN]}: the ids of data.blend reach from 0 to {plan.num_ids - 1}",
                where=f"{path}:{number}",
                fix="take ids from the ledger of this run",
            )
        ids.add(int(text))
    return Quarantine(frozenset(ids), hashlib.sha256(content).hexdigest())


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        is_setting = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError)
        kind = ConfigError if is_setting else StorageError
        what = f"data.quarantine cannot be read: {error.strerror or error}"
        raise kind(what, where=path, fix="correct the path, or remove data.quarantine") from None


def _read_ids(content: bytes, path: str) -> Iterator[tuple[int, str]]:
    """Yield the number of each line with an id, and the id."""
    for number, line in enumerate(content.decode("utf-8-sig", errors="replace").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if not (text.isascii() and text.isdigit()):
            shown = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
            raise DataError(f"{shown!r} is not the id of a sample", where=f"{path}:{number}", fix="write one id a line")
        yield number, text
