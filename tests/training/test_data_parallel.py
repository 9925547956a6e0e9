import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlm.training import optimizer
from megatron_vlm.training.step import train_step
from tests.support.configs import tiny_run
from tests.support.jobs import CPU, FixedPlan, batches_of, start
from tests.support.samples import make_samples

pytestmark = pytest.mark.usefixtures("one_rank")

ROWS = [[0, 1], [2, 3]] * 2
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


class Collectives(TorchDispatchMode):
    """Lists the collectives that are called while it is entered."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def run(precision, **parallel):
    """Do two steps on one rank; return losses, gradient norms and collectives of the second one, and the weights."""
    training = {"global_batch_size": 2, "train_iters": 2, "precision": precision}
    config = tiny_run(training=training, parallel=parallel)
    state = start(config, FixedPlan.of(config, ROWS))
    loader, measured = batches_of(config, state.rank, ROWS, make_samples(4), 0), []
    for _ in range(2):
        with Collectives() as collectives:
            metrics = train_step(state, [loader], device=CPU, stop_requested=False)
        state.iteration += 1
        measured.append((metrics.loss, metrics.grad_norm))
    return measured, collectives.names, [parameter.detach().clone() for parameter in state.chunks[0].parameters()]


@pytest.mark.parametrize("parallel", [{}, {"use_distributed_optimizer": False}, OVERLAP], ids=["", "plain", "overlap"])
def test_a_step_of_one_rank_calls_no_collective(parallel):
    assert run("fp32", **parallel)[1] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rank_alone_trains_as_with_collectives_over_itself(precision, monkeypatch):
    measured, _, weights = run(precision)
    monkeypatch.setattr(optimizer, "SingleDataParallel", DistributedDataParallel)
    with_collectives, names, their_weights = run(precision)
    assert any("reduce_scatter" in name for name in names)
    assert any("gather" in name for name in names)
    assert measured == with_collectives
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(weights, their_weights, strict=True))
