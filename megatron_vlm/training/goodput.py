"""Goodput: the fraction of a run's time that went into steps which count, and what took the rest.

The time of a run goes from its first start to its last sign of life, over all attempts and the time between them. It is
told from events.jsonl and metrics.jsonl alone, so a report can be made on any machine and after a kill.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from megatron_vlm.config import ExitCode
from megatron_vlm.platform.files.events import BEGIN, END, FAILED_SAVE, SAVE, START, VALIDATION, Event
from megatron_vlm.platform.files.metrics import Record

IN_GOOD_ORDER = (ExitCode.DONE, ExitCode.REQUEUE, ExitCode.INTERRUPTED)
"""Exit codes of a job that did not fail."""


@dataclass(slots=True)
class Goodput:
    """That of a run that goes on."""

    first_start: float
    """Of the run, over all attempts [Unix time]."""
    seconds_in_steps: float
    """In the steps done, without those that were lost."""

    def until(self, unix_time: float) -> float:
        """Return the fraction of the time until then."""
        # A clock that is set may make it look as if less time had passed than in the steps.
        passed = max(self.seconds_in_steps, unix_time - self.first_start)
        return self.seconds_in_steps / passed if passed else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSpent:
    """Where the time of a run went [s]."""

    steps: float = 0.0
    """Steps that count."""
    lost_steps: float = 0.0
    """Steps that a later attempt did again, and what passed from the last one until the end of a job that failed."""
    start: float = 0.0
    """From the first start to the first step."""
    restart: float = 0.0
    """From the end of an attempt to the first step of the next."""
    save: float = 0.0
    """Steps had to wait for it."""
    validation: float = 0.0
    other: float = 0.0
    """Writing of metrics, hooks, the end of a job."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, one.name) for one in fields(self))

    @property
    def goodput(self) -> float:
        """Fraction of the steps that count; 0 if no time has passed."""
        return self.steps / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True)
class _Attempt:
    """From its first step to its end."""

    begin: float
    end: float
    failed: bool


def time_spent(events: Sequence[Event], records: Sequence[Record]) -> TimeSpent | None:
    """Return where the time of a run went.

    Args:
        events: in the order of the file.
        records: one for each iteration done, with `unix_time` and `seconds`.

    Returns:
        None if no attempt has begun its first step.
    """
    begins = [event for event in events if event.kind == BEGIN]
    if not begins:
        return None
    attempts, first = list(_attempts(events, records)), first_start(events, default=begins[0].unix_time)
    parts = {
        "steps": seconds_in_steps(records),
        "lost_steps": sum(event.number("lost_seconds") for event in begins)
        + sum(_tail(one, events, records) for one in attempts if one.failed),
        "start": attempts[0].begin - first,
        "restart": sum(later.begin - earlier.end for earlier, later in itertools.pairwise(attempts)),
        "save": sum(event.seconds() for event in events if event.kind in (SAVE, FAILED_SAVE)),
        "validation": sum(event.seconds() for event in events if event.kind == VALIDATION),
    }
    whole = attempts[-1].end - first
    return TimeSpent(**parts, other=max(0.0, whole - sum(parts.values())))


def seconds_in_steps(records: Sequence[Record]) -> float:
    """Return the time of steps; those of versions without events, which lack `unix_time`, were before the first start.

    Args:
        records: one for each iteration.
    """
    seconds = (record.get("seconds") for record in records if "unix_time" in record)
    return math.fsum(value for value in seconds if isinstance(value, float))


def first_start(events: Sequence[Event], default: float) -> float:
    """Return when the run was first started [Unix time], `default` if no event says so."""
    return next((event.unix_time for event in events if event.kind in (START, BEGIN)), default)


def _attempts(events: Sequence[Event], records: Sequence[Record]) -> Iterator[_Attempt]:
    places = [place for place, event in enumerate(events) if event.kind == BEGIN]
    for place, following in itertools.zip_longest(places, places[1:]):
        inside = list(itertools.takewhile(lambda event: event.kind != START, events[place + 1 : following]))
        end = next((event for event in inside if event.kind == END), None)
        begin, until = events[place].unix_time, float("inf")
        if end is not None:
            code = end.details.get("exit_code")
            yield _Attempt(begin, end.unix_time, failed=code not in IN_GOOD_ORDER)
            continue
        signs = [event.unix_time for event in inside]
        if following is not None:
            until = events[following].unix_time
            signs.append(events[following].number("lost_until"))
        signs += [time for time in _step_times(records) if begin <= time < until]
        yield _Attempt(begin, max([begin, *signs]), failed=following is not None)


def _tail(attempt: _Attempt, events: Sequence[Event], records: Sequence[Record]) -> float:
    """Return the time between the last step or event of an attempt and its end."""
    times = [event.unix_time for event in events if event.kind != END]
    times += [event.number("lost_until") for event in events if event.kind == BEGIN]
    times += _step_times(records)
    # A clock that was set back puts the end before the beginning.
    inside = [time for time in times if attempt.begin <= time <= attempt.end]
    return attempt.end - max(inside, default=attempt.end)


def _step_times(records: Sequence[Record]) -> list[float]:
    return [record["unix_time"] for record in records if isinstance(record.get("unix_time"), float)]
