"""Read metrics.jsonl of a run folder, during the run and after a kill as well."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_vlm.platform.files.durable import write_durably
from megatron_vlm.platform.files.run_folder import METRICS_NAME

Record = dict[str, Any]


def read_metrics(run_dir: Path) -> list[Record]:
    """Return one record per iteration of a run, in order; empty before the first iteration."""
    return last_of_each_iteration(read_records(run_dir)[0])


def read_records(run_dir: Path) -> tuple[list[Record], int]:
    """Return the records in the order of the file, and the number of lines that are not complete records."""
    try:
        lines = (run_dir / METRICS_NAME).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return [], 0
    records = [record for record in map(parse_record, lines) if record is not None]
    return records, len(lines) - len(records)


def last_of_each_iteration(records: Iterable[Record]) -> list[Record]:
    """Return one record per iteration, in order; the last one if an iteration was repeated."""
    by_iteration: dict[int, Record] = {}
    for record in records:
        # Validation losses may be on a line of their own.
        by_iteration.setdefault(record["iteration"], {}).update(record)
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]


def drop_after(path: Path, iteration: int) -> list[Record]:
    """Remove the lines after an iteration, and what is no record: a line that a kill cut short or a disk damaged.

    Returns:
        The records that are left; none if there is no such file.
    """
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines()
    kept = [(line, record) for line in lines if (record := parse_record(line)) and record["iteration"] <= iteration]
    write_durably(path, "".join(f"{line}\n" for line, _ in kept).encode())
    return [record for _, record in kept]


def parse_record(line: str) -> Record | None:
    """Return the record of a line; None if a kill or a damaged disk left something else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("iteration")) is int else None
