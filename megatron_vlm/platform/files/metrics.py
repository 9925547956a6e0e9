"""Read metrics.jsonl of a run folder, during the run and after a kill as well."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_vlm.platform.files.durable import write_durably
from megatron_vlm.platform.files.run_folder import METRICS_NAME

Record = dict[str, Any]
_TAIL_BYTES = 1 << 16


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


def read_last(run_dir: Path, count: int) -> list[Record]:
    """Return what `read_metrics` returns last, at most `count` records, without reading more than the end of the file.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        size = (run_dir / METRICS_NAME).stat().st_size
        with (run_dir / METRICS_NAME).open("rb") as file:
            length = _TAIL_BYTES
            while True:
                begin = max(0, size - length)
                file.seek(begin)
                lines = file.read().decode(errors="replace").splitlines()[begin > 0 :]  # the first one is cut
                records = last_of_each_iteration(record for record in map(parse_record, lines) if record is not None)
                # The first iteration may have had a line before.
                if len(records) > count or not begin:
                    return records[-count:]
                length *= 4
    except FileNotFoundError:
        return []


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
    past = PastRecords(path, iteration)
    past.drop_lost()
    return past.kept


class PastRecords:
    """What a file of records holds when a run goes on after an iteration, read once.

    Args:
        path: of the file, which may be missing.
        iteration: records after it are lost.
    """

    def __init__(self, path: Path, iteration: int) -> None:
        self._path = path
        self._content = path.read_bytes() if path.exists() else b""
        self.kept: list[Record] = []
        """In the order of the file."""
        self.lost: list[Record] = []
        self._lines: list[str] = []
        for line in self._content.decode(errors="replace").splitlines():
            record = parse_record(line)
            if record is not None and record["iteration"] <= iteration:
                self.kept.append(record)
                self._lines.append(line)
            elif record is not None:
                self.lost.append(record)

    def drop_lost(self) -> None:
        """Remove the lines of lost records from the file, and what is no record: a line cut short or damaged."""
        content = "".join(f"{line}\n" for line in self._lines).encode()
        if content != self._content:
            write_durably(self._path, content)


def parse_record(line: str) -> Record | None:
    """Return the record of a line; None if a kill or a damaged disk left something else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("iteration")) is int else None
