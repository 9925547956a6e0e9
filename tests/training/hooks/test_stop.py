import dataclasses

import pytest

from megatron_vlm.training.hooks.stop import Hook
from megatron_vlm.training.state import EXIT_ITERATION, SIGNALLED
from tests.support.states import METRICS, make_state


@pytest.mark.parametrize(
    ("iteration", "is_signalled", "reason"),
    [(2, False, None), (3, False, EXIT_ITERATION), (2, True, SIGNALLED), (3, True, SIGNALLED)],
)
def test_run_ends_for_a_signal_or_at_its_exit_iteration(iteration, is_signalled, reason):
    state = make_state(iteration=iteration, training={"exit_iteration": 3})
    Hook().step(state, dataclasses.replace(METRICS, stop_requested=is_signalled))
    assert state.stop_reason == reason


def test_reason_of_an_earlier_hook_stays():
    state = make_state(iteration=3, training={"exit_iteration": 3}, stop_reason=SIGNALLED)
    Hook().step(state, METRICS)
    assert state.stop_reason == SIGNALLED
