import pytest
import torch

from megatron_vlm.checkpoint.folder import find_checkpoint
from megatron_vlm.checkpoint.tensors import list_tensors, read_tensor
from megatron_vlm.training.hooks import checkpoint
from tests.support.configs import tiny_run
from tests.support.overlap import OVERLAP
from tests.support.states import METRICS, make_state

LAYOUTS = {"plain": {}, "overlapped": OVERLAP}


@pytest.mark.parametrize(
    ("iteration", "stop_reason", "is_saved"),
    [(499, None, False), (500, None, True), (1000, None, True), (7, "signalled", True), (10, None, True)],
)
def test_checkpoints_come_at_the_interval_and_before_the_run_ends(monkeypatch, iteration, stop_reason, is_saved):
    calls = []
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *arguments: calls.append("saved"))
    state = make_state(iteration=iteration, stop_reason=stop_reason, chunks=[], optimizer=None, base=None)
    state.progress, state.gather_parameters = dict, lambda: calls.append("gathered")
    checkpoint.Hook().step(state, METRICS)
    assert calls == (["gathered", "saved"] if is_saved else [])


@pytest.mark.distributed
def test_saved_weights_are_whole_where_their_gather_is_overlapped(workers, tmp_path):
    """Each rank updates its own shard; without a gather before the save, the others' shards are a step behind."""
    tensors = []
    for name, parallel in LAYOUTS.items():
        config = tiny_run(str(tmp_path / name), parallel=parallel, training={"global_batch_size": 2, "train_iters": 2})
        workers.run("tests.support.jobs:save_after_steps", 2, config=config, rows=[[0], [1], [2], [3]])
        folder = find_checkpoint(str(tmp_path / name))
        tensors.append({key: read_tensor(folder, key) for key in list_tensors(folder)})
    plain, overlapped = tensors
    assert plain.keys() == overlapped.keys()
    # A step moves a weight by about the learning rate of 1e-3; sums in another order, by rounding.
    assert all(torch.allclose(plain[key], overlapped[key], rtol=0, atol=1e-5) for key in plain)
