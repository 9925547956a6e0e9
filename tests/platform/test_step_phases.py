import pytest

from megatron_vlm.platform import step_phases
from megatron_vlm.platform.step_phases import StepPhase, phase, take_phase_seconds, timed_step

DATA, FORWARD_BACKWARD, OPTIMIZER, OTHER = (
    StepPhase.DATA,
    StepPhase.FORWARD_BACKWARD,
    StepPhase.OPTIMIZER,
    StepPhase.OTHER,
)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(step_phases.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(step_phases, "_stopwatch", step_phases._Stopwatch())
    return now


def step(clock):
    """A step of 1 s of its own, 2 s of forward passes around 4 s of waiting, and 8 s of update."""
    with timed_step():
        clock[0] += 0.5
        with phase(FORWARD_BACKWARD):
            clock[0] += 1
            with phase(DATA):
                clock[0] += 4
            clock[0] += 1
        with phase(OPTIMIZER):
            clock[0] += 8
        clock[0] += 0.5


SECONDS = {DATA: 4.0, FORWARD_BACKWARD: 2.0, StepPhase.GRADIENT_REDUCTION: 0.0, OPTIMIZER: 8.0, OTHER: 1.0}


def test_phases_add_up_to_the_step_and_what_is_between_steps_belongs_to_none(clock):
    for _ in range(2):
        step(clock)
        assert take_phase_seconds() == SECONDS
        clock[0] += 32


def test_outside_of_a_step_nothing_is_timed(clock):
    with phase(FORWARD_BACKWARD), phase(DATA):
        clock[0] += 4
    assert not any(take_phase_seconds().values())


class Event:
    """A moment of a device that is behind the host: it happens once the device has come there."""

    def __init__(self, device: dict, **options) -> None:
        assert options == {"enable_timing": True}
        self.device = device

    def record(self) -> None:
        self.place = self.device["host"][0]

    def query(self) -> bool:
        return self.place <= self.device["done"]

    def elapsed_time(self, later: "Event") -> float:
        assert self.query()
        assert later.query()
        return 1e3 * (later.place - self.place)


def test_the_device_is_asked_only_for_what_has_happened(clock, monkeypatch):
    device = {"host": clock, "done": 0.0}
    monkeypatch.setattr(step_phases.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(step_phases.torch.cuda, "Event", lambda **options: Event(device, **options))
    step(clock)
    device["done"] = clock[0] - 8.5  # the update is still to come
    assert take_phase_seconds() == {**SECONDS, OPTIMIZER: 0.0, OTHER: 0.5}
    clock[0] += 32
    step(clock)
    device["done"] = clock[0]
    assert take_phase_seconds() == {**SECONDS, OPTIMIZER: 16.0, OTHER: 1.5}
