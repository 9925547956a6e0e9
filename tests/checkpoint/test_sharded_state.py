"""Extra states of modules: what transformer-engine keeps for FP8, and what other modules do not have."""

import dataclasses
import pickle
from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear

from megatron_vlm.checkpoint.folder import find_checkpoint
from megatron_vlm.checkpoint.save import save_checkpoint
from megatron_vlm.checkpoint.sharded_state import describe_model, load_all
from megatron_vlm.config import CheckpointConfig
from tests.support.configs import tiny_run
from tests.support.jobs import start

NOTHING = torch.empty(0, dtype=torch.uint8)
# As transformer-engine has it: a pickle in a tensor of bytes.
SCALES = torch.frombuffer(bytearray(pickle.dumps({"scale_fwd": 2.0})), dtype=torch.uint8)


@pytest.fixture
def extra_state(monkeypatch):
    """A function that sets the extra state of every row-parallel layer; it returns a list of those loaded later."""

    def use(value):
        loaded = []
        monkeypatch.setattr(RowParallelLinear, "get_extra_state", lambda self: value)
        monkeypatch.setattr(RowParallelLinear, "set_extra_state", lambda self, state: loaded.append(state))
        return loaded

    return use


def save(config):
    state = start(config)
    save_checkpoint(config, state.chunks, state.optimizer, state.progress())


def from_weights(config, tmp_path):
    return dataclasses.replace(
        config, run_dir=str(tmp_path / "other"), checkpoint=CheckpointConfig(load_weights=config.run_dir)
    )


@pytest.mark.parametrize("saved", [None, NOTHING])
@pytest.mark.parametrize("wanted", [None, NOTHING])
def test_empty_extra_states_are_neither_saved_nor_asked_for(one_rank, tmp_path, extra_state, saved, wanted):
    config = tiny_run(str(tmp_path / "run"))
    extra_state(saved)
    save(config)
    loaded = extra_state(wanted)
    start(from_weights(config, tmp_path))
    state = start(config)
    assert load_all(find_checkpoint(config.run_dir), state.chunks, state.optimizer) == 0
    # megatron-core gives modules None where a checkpoint has nothing.
    assert set(loaded) == {None}


@pytest.mark.parametrize("wanted", [None, NOTHING], ids=["torch", "transformer_engine"])
def test_extra_states_of_the_checkpoint_reach_the_modules_that_have_none_yet(one_rank, tmp_path, extra_state, wanted):
    config = tiny_run(str(tmp_path / "run"))
    extra_state(SCALES)
    save(config)
    loaded = extra_state(wanted)
    start(config)
    # Two layers of a decoder layer, four times; the tower has some more.
    assert len(loaded) >= 8
    assert all(torch.equal(state, SCALES) for state in loaded)


def test_a_model_chunk_that_holds_nothing_is_left_out(one_rank, tmp_path):
    """megatron-core would take its empty state for a setting, on which the ranks disagree."""
    chunks = start(tiny_run(str(tmp_path))).chunks
    empty = SimpleNamespace(sharded_state_dict=lambda **options: {})
    assert set(describe_model([*chunks, empty])) == {"model0"}
