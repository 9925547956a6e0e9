from types import SimpleNamespace

import pytest

from megatron_vlm.platform.files.events import BLEND, read_events
from megatron_vlm.training.hooks.blend import Hook
from tests.support.states import METRICS, make_state


@pytest.mark.parametrize(("iteration", "is_change"), [(4, False), (5, True), (6, False)])
def test_a_change_is_an_event_of_the_iteration_before_it(tmp_path, iteration, is_change):
    plan = SimpleNamespace(summary=SimpleNamespace(step_iterations=(5, 8)))
    Hook().step(make_state(tmp_path, iteration, plan=plan), METRICS)
    events = [(event.kind, event.iteration, event.what) for event in read_events(tmp_path)[0]]
    assert events == ([(BLEND, 5, "data.blend changes from iteration 6 on")] if is_change else [])


def test_a_change_that_a_resume_brings_is_noted_once(tmp_path):
    plan = SimpleNamespace(summary=SimpleNamespace(step_iterations=(5, 8)))
    for iteration in (4, 5, 5):
        Hook().start(make_state(tmp_path, iteration, plan=plan))
    assert [(event.kind, event.iteration) for event in read_events(tmp_path)[0]] == [(BLEND, 5)]
