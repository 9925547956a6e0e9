import json
from types import SimpleNamespace

import pytest
import torch

from megatron_vlm.config import ConfigError
from megatron_vlm.config.hooks.profiler import Config
from megatron_vlm.training.hooks.profiler import Hook
from tests.support.states import METRICS, make_state


def trace(run_dir, rank=0, last=4, **settings):
    hook = Hook(Config(**settings))
    hook.start(make_state(run_dir, 0, rank=SimpleNamespace(rank=rank, world_size=2)))
    for iteration in range(1, last + 1):
        torch.ones(3) @ torch.ones(3)
        hook.step(make_state(run_dir, iteration, rank=SimpleNamespace(rank=rank, world_size=2)), METRICS)
    hook.close(make_state(run_dir, last, rank=SimpleNamespace(rank=rank, world_size=2)))
    return sorted(path.name for path in (run_dir / "profile").glob("*"))


def test_chosen_iterations_are_traced(tmp_path):
    assert trace(tmp_path, iterations=(1, 3)) == [
        "iteration_0000001_rank_00000.json",
        "iteration_0000003_rank_00000.json",
    ]
    events = json.loads((tmp_path / "profile" / "iteration_0000003_rank_00000.json").read_text())["traceEvents"]
    assert any("aten::dot" in event["name"] for event in events)


def test_other_ranks_write_nothing(tmp_path):
    assert trace(tmp_path, rank=1, iterations=(1,)) == []
    assert trace(tmp_path, rank=1, iterations=(1,), ranks=(1,)) == ["iteration_0000001_rank_00001.json"]


def test_iteration_that_is_not_finished_leaves_no_trace(tmp_path):
    assert trace(tmp_path, iterations=(5,), last=4) == []


def test_rank_that_the_job_does_not_have_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"ranks \[0, 2\] do not all exist; fix: name ranks from 0 to 1"):
        trace(tmp_path, iterations=(1,), ranks=(0, 2))
