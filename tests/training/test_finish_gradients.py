"""The end of a batch equals megatron-core's own, without its host reads. Several ranks: test_parity.py."""

import pytest
import torch
from megatron.core.distributed import finalize_model_grads

from megatron_vlm.training import finish_gradients as module
from megatron_vlm.training.finish_gradients import finish_gradients
from tests.support.configs import tiny_run
from tests.support.host_reads import HostReads
from tests.support.jobs import start


@pytest.fixture
def state(one_rank):
    return start(tiny_run())


def finished(state, finish, num_labels):
    """Return all gradients after `finish`, from the same ones at every call, and how often the host read a tensor."""
    generator = torch.Generator().manual_seed(5)
    for chunk in state.wrapped:
        chunk.zero_grad_buffer()
        for parameter in chunk.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    count = None if num_labels is None else torch.tensor(num_labels, dtype=torch.int32)
    with HostReads() as reads:
        finish(list(state.wrapped), count)
    return torch.cat([p.main_grad.flatten().clone() for p in state.chunks[0].parameters()]), reads.count


@pytest.mark.parametrize("num_labels", [None, 0, 1, 7, 40_000])
def test_gradients_equal_megatron_cores_to_the_bit_without_a_host_read(state, num_labels):
    theirs, _ = finished(state, finalize_model_grads, num_labels)
    ours, reads = finished(state, finish_gradients, num_labels)
    assert torch.equal(ours, theirs)
    assert reads == 0


def test_megatron_cores_own_division_reads_on_the_host(state):
    assert finished(state, finalize_model_grads, 7)[1] > 0


def test_the_schedule_finishes_with_it(state):
    assert state.wrapped[0].config.finalize_model_grads_func is finish_gradients


@pytest.mark.parametrize("size", [1, 500, 10**9])
def test_every_gradient_of_a_vision_part_is_in_one_piece_and_no_other_is(state, monkeypatch, size):
    monkeypatch.setattr(module, "_PIECE_SIZE", size)
    pieces = list(module._pieces(state.wrapped))
    chunk = state.chunks[0]
    vision = [*chunk.vision_model.parameters(), *chunk.vision_projection.parameters()]
    found = [grad.data_ptr() for piece in pieces for grad in piece]
    assert sorted(found) == sorted(parameter.main_grad.data_ptr() for parameter in vision)
    assert sum(grad.numel() for piece in pieces for grad in piece) == sum(p.numel() for p in vision)
    assert all(len(piece) == 1 or sum(grad.numel() for grad in piece) <= size for piece in pieces)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [500, 10**9])
def test_the_average_is_that_of_the_ranks_whatever_the_pieces(workers, size):
    for average, expected in workers.run("tests.support.jobs:averaged_replicas", 2, piece_size=size):
        assert average == pytest.approx(expected, rel=1e-6)
