"""Hooks start in order and close in reverse order, and no later error hides the first."""

import logging

import pytest

from megatron_vlm.config.hooks.profiler import Config
from megatron_vlm.training.hook import build_hooks, running
from megatron_vlm.training.hooks import profiler


class Recorder:
    def __init__(self, name, events, fails_in=None):
        self.name, self.events, self.fails_in = name, events, fails_in

    def start(self, state):
        self._note("start")

    def step(self, state, metrics):
        self._note("step")

    def close(self, state):
        self._note("close")

    def _note(self, what):
        self.events.append(f"{what} {self.name}")
        if what == self.fails_in:
            raise ValueError(f"{what} {self.name} failed")


def test_hooks_close_in_reverse_order():
    events = []
    with running([Recorder("a", events), Recorder("b", events)], state=None):
        events.append("steps")
    assert events == ["start a", "start b", "steps", "close b", "close a"]


def test_hooks_close_after_an_error():
    events = []
    with pytest.raises(KeyError, match="steps"), running([Recorder("a", events)], state=None):
        raise KeyError("steps")
    assert events == ["start a", "close a"]


def test_only_hooks_that_started_close():
    events = []
    hooks = [Recorder("a", events), Recorder("b", events, "start"), Recorder("c", events)]
    with pytest.raises(ValueError, match="start b failed"), running(hooks, state=None):
        pass
    assert events == ["start a", "start b", "close a"]


def test_error_while_closing_is_raised_and_the_other_hooks_close():
    events = []
    hooks = [Recorder("a", events, "close"), Recorder("b", events, "close")]
    with pytest.raises(ValueError, match="close b failed"), running(hooks, state=None):
        pass
    assert events[-2:] == ["close b", "close a"]


def test_error_while_closing_does_not_hide_the_first(caplog):
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(KeyError, match="steps"),
        running([Recorder("a", [], "close")], state=None),
    ):
        raise KeyError("steps")
    assert "could not be closed: close a failed" in caplog.text


def test_hooks_are_built_by_the_names_in_the_settings():
    (hook,) = build_hooks([Config(iterations=(3,))])
    assert isinstance(hook, profiler.Hook)
    assert hook.config.iterations == (3,)
