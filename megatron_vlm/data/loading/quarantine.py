"""Samples to leave out: `data.quarantine` names a file of their ids.

The plan stays as it is, and so do the rows and the hash of what was consumed. A sample that is left out keeps its place
among the samples of its row, but is not read and takes no position: the row ends earlier and is filled with padding.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_vlm.config import DataError, StorageError
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


def read_quarantine(path: str, plan: Plan) -> Quarantine:
    """Read a file of ids, one a line; empty lines, and what follows a `#`, do not count.

    Args:
        path: of the file.
        plan: counts the ids: those of the ledger.

    Raises:
        DataError: a line is no id of the plan; names file and line.
        StorageError: the file cannot be read.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        what = f"data.quarantine cannot be read: {error.strerror or error}"
        raise StorageError(what, where=path, fix="correct the path, or remove data.quarantine") from None
    ids = set()
    for number, line in enumerate(content.decode("utf-8-sig", errors="replace").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if not (text.isascii() and text.isdigit()):
            shown = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
            raise DataError(f"{shown!r} is not the id of a sample", where=f"{path}:{number}", fix="write one id a line")
        if len(text) > len(str(plan.num_ids)) or int(text) >= plan.num_ids:
            raise DataError(
                f"there is no sample {text[:_MAX_SHOWN]}: the ids of data.blend reach from 0 to {plan.num_ids - 1}",
                where=f"{path}:{number}",
                fix="take ids from the ledger of this run",
            )
        ids.add(int(text))
    return Quarantine(frozenset(ids), hashlib.sha256(content).hexdigest())
