"""The step with clipping equals megatron-core's own, without its host reads."""

import math

import pytest
import torch

from megatron_vlm.checkpoint.adam_state import inner_optimizers
from megatron_vlm.training.clipping import clipped_step, gradient_norm
from tests.support.configs import tiny_run
from tests.support.host_reads import HostReads
from tests.support.jobs import CPU, start

pytestmark = pytest.mark.usefixtures("one_rank")


def state_with_gradients(*, distributed: bool, clip_grad: float = 1.0):
    """Return a run whose parameters have random gradients, the same at every call."""
    config = tiny_run(parallel={"use_distributed_optimizer": distributed}, optimizer={"clip_grad": clip_grad})
    state = start(config)
    generator = torch.Generator().manual_seed(5)
    for parameter in state.chunks[0].parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    return state


def squares(state) -> float:
    return sum(float(p.main_grad.double().square().sum()) for p in state.chunks[0].parameters())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clip_grad", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("distributed", [True, False])
def test_the_update_is_that_of_megatron_core(distributed, clip_grad, fused):
    ours = state_with_gradients(distributed=distributed, clip_grad=clip_grad)
    if not fused:
        for inner in inner_optimizers(ours.optimizer):
            for group in inner.optimizer.param_groups:
                group["fused"] = False
    norm = clipped_step(ours.optimizer, clip_grad, CPU)
    theirs = state_with_gradients(distributed=distributed, clip_grad=clip_grad)
    _, their_norm, _ = theirs.optimizer.step()
    assert float(norm) == pytest.approx(their_norm, rel=1e-6)  # they sum in float32
    for mine, other in zip(ours.chunks[0].parameters(), theirs.chunks[0].parameters(), strict=True):
        # Times a coefficient or over its inverse: one unit of float32 in the weights, which are at most about 1.
        torch.testing.assert_close(mine, other, rtol=0, atol=2.5e-7)


def test_clipping_changes_the_moments_of_the_optimizer():
    moments = []
    for clip_grad in (0.0, 1.0):
        state = state_with_gradients(distributed=True, clip_grad=clip_grad)
        norm = float(clipped_step(state.optimizer, clip_grad, CPU))
        adam = inner_optimizers(state.optimizer)[0].optimizer
        moments.append(torch.cat([entry["exp_avg"].flatten() for entry in adam.state.values()]))
    torch.testing.assert_close(moments[1] * (norm + 1e-6), moments[0])


def test_the_norm_is_of_all_gradients():
    state = state_with_gradients(distributed=True)
    expected = math.sqrt(squares(state))
    state.optimizer.prepare_grads()
    assert float(gradient_norm(state.optimizer, CPU)) == pytest.approx(expected, rel=1e-6)  # float32 parts


def test_the_host_reads_nothing_from_the_device():
    state = state_with_gradients(distributed=True)
    with HostReads() as reads:
        clipped_step(state.optimizer, 1.0, CPU)
    assert reads.count == 0
    with HostReads() as reads:
        state.optimizer.step()
    assert reads.count > 0  # megatron-core's own step: the test can see host reads
