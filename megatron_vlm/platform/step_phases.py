"""Seconds that a rank spends in each phase of a step, without waiting for the device.

On a GPU, an event is put into the stream where a phase begins, and times are read from events that have happened:
those of an update, which nothing waits for, one step late. So a phase has the time that the device spent in it, and
waiting for data is what the device waited, not what its loader took beside it. On a CPU, the clock tells.
"""

import enum
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepPhase(enum.Enum):
    """What a rank does in a step."""

    DATA = "data"
    """It waits for a micro-batch."""
    FORWARD_BACKWARD = "forward_backward"
    """With the waits of a pipeline, and the reductions that overlap with it."""
    GRADIENT_REDUCTION = "gradient_reduction"
    """What is left of it after the last backward pass."""
    OPTIMIZER = "optimizer"
    OTHER = "other"


_Mark = float | torch.cuda.Event
"""A moment on the clock of the host, or in the stream of the device."""


def _mark() -> _Mark:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(first: _Mark, second: _Mark) -> float:
    if isinstance(first, float) or isinstance(second, float):
        return float(second) - float(first)  # type: ignore[arg-type]
    return first.elapsed_time(second) / 1e3


class _Stopwatch:
    """The phases of this process."""

    def __init__(self) -> None:
        self.phase: StepPhase | None = None
        """None: no step is under way."""
        self._marks: list[tuple[StepPhase | None, _Mark]] = []
        """Where each phase begins."""

    def switch(self, phase: StepPhase | None) -> None:
        self._marks.append((phase, _mark()))
        self.phase = phase

    def take(self) -> dict[StepPhase, float]:
        seconds = dict.fromkeys(StepPhase, 0.0)
        while len(self._marks) > 1:
            (phase, mark), (_, later) = self._marks[:2]
            if not isinstance(later, float) and not later.query():
                break  # the device has not come so far
            if phase is not None:
                seconds[phase] += _seconds_between(mark, later)
            del self._marks[0]
        return seconds


_stopwatch = _Stopwatch()


@contextmanager
def timed_step() -> Iterator[None]:
    """Time the phases of the step inside the block; what belongs to none of them is `StepPhase.OTHER`."""
    _stopwatch.switch(StepPhase.OTHER)
    try:
        yield
    finally:
        _stopwatch.switch(None)


@contextmanager
def phase(which: StepPhase) -> Iterator[None]:
    """Say what the block does; then what was done before goes on. Outside of a step, nothing is timed."""
    before = _stopwatch.phase
    if before is None:
        yield
        return
    _stopwatch.switch(which)
    try:
        yield
    finally:
        _stopwatch.switch(before)


def take_phase_seconds() -> dict[StepPhase, float]:
    """Return the time in each phase since the last call, as far as it has passed on the device [s]."""
    return _stopwatch.take()
