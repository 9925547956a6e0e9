"""The records of a run folder: metrics by iteration, events, where the time went, and how the run ended.

Only files are read, so this works on any machine, during the run, and after a kill.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_vlm.checkpoint.folder import checkpoint_path, list_iterations
from megatron_vlm.checkpoint.manifest import MANIFEST_NAME
from megatron_vlm.config import DataError
from megatron_vlm.platform.files.events import END, Event, read_events
from megatron_vlm.platform.files.metrics import Record, last_of_each_iteration, read_records
from megatron_vlm.platform.files.run_folder import CONFIG_NAME, EXIT_STATUS_NAME, METRICS_NAME
from megatron_vlm.platform.launch.exit_status import ExitStatus, read_exit_status
from megatron_vlm.training.goodput import TimeSpent, time_spent

INCOMPLETE = "incomplete"
"""Kind of the event that a checkpoint without a manifest stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecords:
    """Everything a report of a run is made from."""

    run_dir: Path
    metrics: Sequence[Record]
    """One record per iteration, in order; the last one if an iteration was repeated."""
    unreadable_lines: int
    """Lines of metrics.jsonl and events.jsonl that are not complete; a killed process leaves such a line."""
    config_text: str
    """Content of config.yaml; empty if there is none."""
    events: Sequence[Event]
    """In chronological order."""
    time_spent: TimeSpent | None
    """None before the first step, and in run folders of versions without events.jsonl."""
    end: ExitStatus | None
    """None: the run is going on, or its launcher was killed as well."""

    @property
    def config(self) -> dict[str, Any]:
        """The settings as plain values; empty if the file is missing or unreadable."""
        try:
            values = yaml.safe_load(self.config_text)
        except (yaml.YAMLError, ValueError):  # yaml raises ValueError for a date that does not exist
            return {}
        return values if isinstance(values, dict) else {}

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the iterations whose record has a number under `key`, and these numbers."""
        found = [(record["iteration"], record[key]) for record in self.metrics if _is_number(record.get(key))]
        return [iteration for iteration, _ in found], [value for _, value in found]

    def names(self, prefix: str) -> list[str]:
        """Return the rest of each key that starts with `prefix`, in order of first appearance."""
        keys = dict.fromkeys(key for record in self.metrics for key in record if key.startswith(prefix))
        return [key.removeprefix(prefix) for key in keys]

    @property
    def padding(self) -> float:
        """Fraction of the positions in all packed rows of the run that hold no token."""
        numbers = (one for one in self.metrics if _is_number(one.get("tokens")) and _is_number(one.get("padding")))
        full = [record for record in numbers if record["tokens"] and record["padding"] < 1.0]
        positions = math.fsum(record["tokens"] / (1.0 - record["padding"]) for record in full)
        return 1.0 - math.fsum(record["tokens"] for record in full) / positions if positions else 0.0

    def total(self, key: str) -> float:
        """Return the sum of the finite numbers under `key`."""
        return math.fsum(value for value in self.series(key)[1] if math.isfinite(value))


def read_run(run_dir: Path) -> RunRecords:
    """Read the folder of a run, finished or not.

    Raises:
        DataError: the folder does not exist or is not a run folder.
    """
    if not any((run_dir / name).is_file() for name in (METRICS_NAME, CONFIG_NAME, EXIT_STATUS_NAME)):
        raise DataError(
            f"not a run folder: it holds neither {METRICS_NAME} nor {CONFIG_NAME}",
            where=str(run_dir),
            fix="name the run_dir of a training run",
        )
    records, unreadable_lines = read_records(run_dir)
    end = read_exit_status(run_dir / EXIT_STATUS_NAME)
    metrics = last_of_each_iteration(records)
    recorded, unreadable_events = read_events(run_dir)
    events = [*recorded, *_unfinished(run_dir), *_last_end(recorded, end)]
    return RunRecords(
        run_dir=run_dir,
        metrics=metrics,
        unreadable_lines=unreadable_lines + unreadable_events,
        config_text=_read_text(run_dir / CONFIG_NAME),
        events=sorted(events, key=lambda event: event.unix_time),
        time_spent=time_spent(recorded, metrics),
        end=end,
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unfinished(run_dir: Path) -> Iterator[Event]:
    """Yield the checkpoints that a kill left incomplete."""
    for iteration in list_iterations(run_dir):
        path = checkpoint_path(run_dir, iteration)
        if not (path / MANIFEST_NAME).is_file():
            yield Event(
                kind=INCOMPLETE, what=f"{path.name} is incomplete", iteration=iteration, unix_time=path.stat().st_mtime
            )


def _last_end(events: Sequence[Event], end: ExitStatus | None) -> Iterator[Event]:
    """Yield how the run ended, if no launcher has recorded it as an event."""
    if end is None or (events and events[-1].kind == END):
        return
    what = f"ended with exit code {end.exit_code}" + (f": {end.message}" if end.message else "")
    details = {"exit_code": end.exit_code}
    yield Event(kind=END, what=what, iteration=end.iteration, unix_time=end.unix_time, details=details)
