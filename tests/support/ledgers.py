"""Read the ledger of a run back."""

import json
from pathlib import Path

import numpy as np

from megatron_vlm.data.plan.ledger import LedgerEntry


def read_ledger(folder: Path) -> list[tuple[LedgerEntry, np.ndarray]]:
    """Return every entry with its sample ids, int64[samples]."""
    entries = [LedgerEntry(**json.loads(line)) for line in (folder / "iterations.jsonl").read_text().splitlines()]
    ids = np.fromfile(folder / "sample_ids.bin", dtype="<i8")
    assert len(ids) == sum(entry.samples for entry in entries)
    return list(zip(entries, np.split(ids, np.cumsum([entry.samples for entry in entries])[:-1]), strict=True))
