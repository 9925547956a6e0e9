import numpy as np

from megatron_vlm.training.hooks.ledger import Hook
from tests.support.jobs import FixedPlan
from tests.support.ledgers import read_ledger
from tests.support.states import METRICS, make_state


class TwoSamples(FixedPlan):
    def sample_ids(self, iteration):
        return np.array([iteration, iteration + 1])


def test_what_ranks_consumed_is_recorded(tmp_path):
    hook, plan = Hook(), TwoSamples(num_iterations=3, row_lengths=(8,))
    hook.start(make_state(tmp_path, plan=plan))
    for iteration in (1, 2):
        hook.step(make_state(tmp_path, iteration, plan=plan), METRICS)
    hook.close(make_state(tmp_path, plan=plan))
    found = [(entry.iteration, entry.sample_ids_sha, ids.tolist()) for entry, ids in read_ledger(tmp_path / "ledger")]
    assert found == [(1, "00ff", [0, 1]), (2, "00ff", [1, 2])]


def test_other_ranks_write_nothing(tmp_path):
    hook, state = Hook(), make_state(tmp_path, 1, is_reporter=False)
    hook.start(state)
    hook.step(state, METRICS)
    hook.close(state)
    assert not list(tmp_path.iterdir())
