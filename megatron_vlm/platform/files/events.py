"""events.jsonl of a run folder: what happened to the run beside its steps, over all its attempts.

A line is a JSON object with `kind`, `unix_time`, `iteration` (steps done, or null), `what` (one line for people) and
further plain values of its kind. Lines are only ever appended, by the launcher and by the rank that reports. A kind is
any word; `report` marks those in `KINDS` on the curves and lists all others, too.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlm.platform.files.run_folder import EVENTS_NAME

START, BEGIN, SAVE, FAILED_SAVE, VALIDATION, END = "start", "begin", "save", "failed_save", "validation", "end"
BLEND, SPIKE, BAD_SAMPLES, DAMAGED = "blend", "spike", "bad_samples", "damaged_checkpoint"
KINDS: Mapping[str, str] = {
    START: "the launcher starts the ranks",
    BEGIN: "the first step of an attempt is about to begin; `lost_iterations` and `lost_seconds` are done again",
    SAVE: "a checkpoint is complete; `seconds` are those that it held up the steps",
    FAILED_SAVE: "a save failed and the run goes on",
    VALIDATION: "a validation took `seconds`",
    END: "the job ended with `exit_code`",
    BLEND: "another blend of datasets applies from the next step on",
    SPIKE: "the loss or the norm of the gradient is far above those before",
    DAMAGED: "a checkpoint is damaged, so that the attempt began from an older one",
    BAD_SAMPLES: "samples could not be read and were replaced",
}
"""What each kind says; any file may add one of its own by recording it."""
_END_OF_TIME = 2.0**36
"""More is no moment that a calendar has, but a damaged line [Unix time]."""
_OWN = ("kind", "unix_time", "iteration", "what")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A line of events.jsonl."""

    kind: str
    unix_time: float
    what: str
    """One line of text."""
    iteration: int | None = None
    """Steps done at that time; None if not known."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further values of its kind."""

    def seconds(self) -> float:
        """Return the time that it took; 0 if it does not say."""
        return self.number("seconds")

    def number(self, name: str) -> float:
        """Return a value of its kind; 0 if there is none, or it is no number."""
        value = self.details.get(name)
        return float(value) if isinstance(value, int | float) else 0.0


def record_event(run_dir: str | Path, kind: str, what: str, *, iteration: int | None = None, **details: Any) -> None:
    """Append an event; it survives the death of the process once the call returns.

    A folder that cannot be written is no reason to end a run, so it is only warned of.

    Args:
        run_dir: the run folder, which exists.
        kind: one word, of `KINDS` or another.
        what: one line for people.
        iteration: steps done.
        **details: plain values for programs; `seconds` is a time that the steps had to wait.
    """
    values = {"kind": kind, "unix_time": time.time(), "iteration": iteration, "what": what, **details}
    try:
        _append(Path(run_dir) / EVENTS_NAME, json.dumps(values).encode() + b"\n")
    except OSError as error:
        logger.warning("an event could not be recorded in %s: %s (%s)", run_dir, error.strerror or error, what)


def _append(path: Path, line: bytes) -> None:
    # One write of a file opened for appending: launcher and rank do not cut each other's lines.
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # a kill cut the last line short
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def read_events(run_dir: str | Path) -> tuple[list[Event], int]:
    """Return the events in the order of the file, and the number of lines that are none; no events without a file."""
    try:
        lines = (Path(run_dir) / EVENTS_NAME).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return [], 0
    events = [event for event in map(_parse, lines) if event is not None]
    return events, len(lines) - len(events)


def _parse(line: str) -> Event | None:
    try:
        values = json.loads(line)
        kind, unix_time, iteration, what = (values[name] for name in _OWN)
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    is_event = isinstance(kind, str) and isinstance(what, str) and type(unix_time) in (int, float)
    if not is_event or not 0 <= unix_time < _END_OF_TIME or not (iteration is None or type(iteration) is int):
        return None
    details = {name: value for name, value in values.items() if name not in _OWN}
    return Event(kind=kind, unix_time=unix_time, what=what, iteration=iteration, details=details)
