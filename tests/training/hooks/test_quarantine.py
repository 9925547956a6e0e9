from types import SimpleNamespace

import numpy as np

from megatron_vlm.data.loading.quarantine import Quarantine
from megatron_vlm.platform.files.events import read_events
from megatron_vlm.training.hooks.quarantine import Hook
from tests.support.states import METRICS, make_state


def run_hook(run_dir, quarantine):
    plan = SimpleNamespace(sample_ids=lambda iteration: np.array([iteration, 10 + iteration]))
    hook, state = Hook(), make_state(run_dir, plan=plan, quarantine=quarantine)
    hook.start(state)
    for iteration in (1, 2, 3):
        state.iteration = iteration
        hook.step(state, METRICS)
    hook.close(state)
    return [(event.what, event.details) for event in read_events(run_dir)[0]]


def test_what_is_left_out_is_counted(tmp_path):
    assert run_hook(tmp_path, Quarantine(frozenset({0, 2, 12, 77}), "abc")) == [
        ("4 samples are in quarantine (None)", {"samples": 4, "sha256": "abc"}),
        ("3 samples in quarantine were left out", {"left_out": 3}),
    ]


def test_without_a_file_nothing_is_said(tmp_path):
    assert run_hook(tmp_path, Quarantine()) == []
