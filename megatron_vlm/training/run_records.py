"""The records of a run folder: metrics by iteration, starts, checkpoints, and how the run ended.

Only files are read, so this works on any machine, during the run, and after a kill.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_vlm.checkpoint.folder import checkpoint_path, list_iterations
from megatron_vlm.checkpoint.manifest import MANIFEST_NAME
from megatron_vlm.config import DataError
from megatron_vlm.platform.files.metrics import Record, last_of_each_iteration, read_records
from megatron_vlm.platform.files.run_folder import CONFIG_NAME, EXIT_STATUS_NAME, METRICS_NAME
from megatron_vlm.platform.launch.exit_status import ExitStatus, read_exit_status

_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\..*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A start, a checkpoint or an end."""

    what: str
    """One line of text."""
    iteration: int | None = None
    """Iterations done at that time; None if not known."""
    unix_time: float | None = None
    is_resume: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecords:
    """Everything a report of a run is made from."""

    run_dir: Path
    metrics: Sequence[Record]
    """One record per iteration, in order; the last one if an iteration was repeated."""
    unreadable_lines: int
    """Lines of metrics.jsonl that are not complete records; a killed process leaves such a line."""
    config_text: str
    """Content of config.yaml; empty if there is none."""
    events: Sequence[Event]
    """In chronological order."""
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
        full = [record for record in self.metrics if record.get("tokens") and record.get("padding", 1.0) < 1.0]
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
    events = [*_starts(run_dir), *_repetitions(records), *_checkpoints(run_dir), *_ends(end)]
    return RunRecords(
        run_dir=run_dir,
        metrics=last_of_each_iteration(records),
        unreadable_lines=unreadable_lines,
        config_text=_read_text(run_dir / CONFIG_NAME),
        events=sorted(events, key=_place_in_time),
        end=end,
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _starts(run_dir: Path) -> Iterator[Event]:
    """Yield every start of the run; each start writes a new TensorBoard file."""
    for path in sorted((run_dir / "tensorboard").glob("events.out.tfevents.*")):
        match = _EVENT_FILE.fullmatch(path.name)
        if match is None:
            continue
        iteration = _first_iteration(path)
        resumed = bool(iteration)
        what = f"resumed after iteration {iteration:,}" if resumed else "started"
        yield Event(what=what, iteration=iteration, unix_time=float(match[1]), is_resume=resumed)


def _first_iteration(path: Path) -> int | None:
    """Return the iterations done before a TensorBoard file was started; None if the file does not say."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event as Written
    from tensorboard.compat.proto.event_pb2 import SessionLog

    size = path.stat().st_size
    with path.open("rb") as stream:
        # Each record: length, checksum of the length, event, checksum of the event.
        while len(head := stream.read(12)) == 12:
            length = int.from_bytes(head[:8], "little")
            if length > size:  # damaged: do not try to read as much
                return None
            content = stream.read(length)
            try:
                event = Written.FromString(content)
            except DecodeError:  # cut short by a kill
                return None
            if event.session_log.status == SessionLog.START:
                return event.step - 1
            stream.read(4)
    return None


def _repetitions(records: Sequence[Record]) -> Iterator[Event]:
    """Yield the places where the iteration goes back: a start from a checkpoint before the last iteration."""
    for earlier, later in zip(records, records[1:], strict=False):
        if "loss" in earlier and "loss" in later and later["iteration"] <= earlier["iteration"]:
            done = later["iteration"] - 1
            what = f"went back from iteration {earlier['iteration']:,} to {done:,}"
            yield Event(what=what, iteration=done, is_resume=True)


def _checkpoints(run_dir: Path) -> Iterator[Event]:
    for iteration in list_iterations(run_dir):
        path = checkpoint_path(run_dir, iteration)
        manifest = path / MANIFEST_NAME
        if manifest.is_file():
            yield Event(what=f"saved {path.name}", iteration=iteration, unix_time=manifest.stat().st_mtime)
        else:
            yield Event(what=f"{path.name} is incomplete", iteration=iteration, unix_time=path.stat().st_mtime)


def _ends(end: ExitStatus | None) -> Iterator[Event]:
    if end is not None:
        what = f"ended with exit code {end.exit_code}" + (f": {end.message}" if end.message else "")
        yield Event(what=what, iteration=end.iteration, unix_time=end.unix_time)


def _place_in_time(event: Event) -> tuple[float, float]:
    iteration = math.inf if event.iteration is None else event.iteration
    return (math.inf if event.unix_time is None else event.unix_time), iteration
