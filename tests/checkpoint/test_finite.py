"""An update can make weights infinite from a finite loss and gradient; the last good checkpoint stays the newest."""

import dataclasses

import pytest
import torch

from megatron_vlm.checkpoint.adam_state import adams, create_state
from megatron_vlm.checkpoint.folder import list_iterations
from megatron_vlm.checkpoint.save import save_checkpoint
from megatron_vlm.config import CheckpointConfig, NumericError
from tests.support.configs import tiny_run
from tests.support.jobs import start


@pytest.fixture
def state(one_rank, tmp_path):
    return start(dataclasses.replace(tiny_run(str(tmp_path)), checkpoint=CheckpointConfig(keep_last=1)))


def save(state, iteration):
    state.iteration = iteration
    return save_checkpoint(state.config, state.chunks, state.optimizer, state.progress())


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_weights_that_are_not_finite_replace_no_checkpoint(state, tmp_path, value):
    save(state, 1)
    weight = list(state.chunks[0].parameters())[-1]
    with torch.no_grad():
        weight.view(-1)[-1] = value
    with pytest.raises(NumericError, match=r"model\..* is not finite after iteration 2, so no checkpoint is saved"):
        save(state, 2)
    assert list_iterations(tmp_path) == [1]


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_moments_count_too(state, name):
    (adam,) = adams(state.optimizer)
    create_state(adam)
    list(adam.state.values())[0][name].view(-1)[0] = float("inf")
    with pytest.raises(NumericError, match=rf"optimizer.state.{name}.model\..* is not finite"):
        save(state, 1)


def test_the_largest_finite_weights_are_saved(state, tmp_path):
    with torch.no_grad():
        next(state.chunks[0].parameters()).fill_(torch.finfo(torch.float32).max)
    save(state, 1)
    assert list_iterations(tmp_path) == [1]
