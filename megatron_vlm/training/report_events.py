"""Events in a report: marks on the curves, and a table."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_vlm.platform.charts import COLORS, Mark
from megatron_vlm.platform.files.events import (
    BEGIN,
    BLEND,
    DAMAGED,
    END,
    FAILED_SAVE,
    SAVE,
    SPIKE,
    START,
    VALIDATION,
    Event,
)
from megatron_vlm.training.goodput import IN_GOOD_ORDER
from megatron_vlm.training.report_page import card, moment, table
from megatron_vlm.training.run_records import RunRecords

_SELDOM = 50
"""Events of one kind in the table; of more, the first and the last are shown."""


@dataclass(frozen=True, slots=True)
class _Look:
    name: str
    belongs: Callable[[Event], bool]
    color: str
    style: str = "--"
    is_tick: bool = False


def _is_fault(event: Event) -> bool:
    return event.kind == END and event.details.get("exit_code") not in IN_GOOD_ORDER


def _is_of_another_kind(event: Event) -> bool:
    return event.kind not in (START, BEGIN, SAVE, FAILED_SAVE, VALIDATION, END, BLEND, SPIKE, DAMAGED)


_LOOKS = (
    _Look("save", lambda event: event.kind == SAVE, "#7a8594", is_tick=True),
    _Look("failed save", lambda event: event.kind == FAILED_SAVE, "#d9722b", ":"),
    _Look("fault", _is_fault, "#b3261e", "-"),
    _Look("resume", lambda event: event.kind == BEGIN and bool(event.iteration), "#1d5fb4"),
    _Look("blend change", lambda event: event.kind == BLEND, COLORS[2], "-."),
    _Look("spike", lambda event: event.kind == SPIKE, COLORS[3], ":"),
    _Look("damaged checkpoint", lambda event: event.kind == DAMAGED, "#8c4a2f", ":"),
    _Look("other", _is_of_another_kind, "#7d6608", is_tick=True),
)


def event_marks(events: Sequence[Event]) -> list[Mark]:
    """Return the marks of the events whose iteration is known, one for each look that occurs."""
    marks = []
    for look in _LOOKS:
        xs = [event.iteration for event in events if event.iteration is not None and look.belongs(event)]
        if xs:
            marks.append(Mark(name=look.name, xs=xs, color=look.color, style=look.style, is_tick=look.is_tick))
    return marks


def events_card(run: RunRecords) -> str:
    """Return a table of all events in order of time."""
    rows = [
        [
            moment(event.unix_time),
            "-" if event.iteration is None else f"{event.iteration:,}",
            html.escape(event.kind),
            html.escape(event.what),
            f"{event.seconds():.3g} s" if event.seconds() else "",
        ]
        for event in _shortened(run.events)
    ]
    notes = []
    if run.unreadable_lines:
        notes.append(f"{run.unreadable_lines} unreadable lines of metrics.jsonl and events.jsonl are ignored.")
    if len(rows) < len(run.events):
        notes.append(f"Of each kind, at most {_SELDOM} events are listed; events.jsonl has all {len(run.events)}.")
    text = f"<p>{' '.join(notes)}</p>" if notes else ""
    names = ["time (UTC)", "iteration", "kind", "event", "steps waited"]
    return card("Events", text + (table(names, rows) if rows else "<p>No events are recorded.</p>"))


def _shortened(events: Sequence[Event]) -> list[Event]:
    """Leave out the middle of the kinds that are frequent."""
    kept: list[Event] = []
    for kind in dict.fromkeys(event.kind for event in events):
        own = [event for event in events if event.kind == kind]
        kept += own if len(own) <= _SELDOM else own[: _SELDOM // 2] + own[-_SELDOM // 2 :]
    return sorted(kept, key=lambda event: event.unix_time)
