"""What the ranks of tests of LoRA run."""

from collections.abc import Sequence

import torch

from megatron_vlm.config import TrainConfig
from megatron_vlm.training.gradients import run_micro_batches
from tests.support.jobs import CPU, DATASETS, FixedPlan, batches_of, start
from tests.support.samples import make_samples


def gradient_norms(config: TrainConfig, rows: Sequence[Sequence[int]], num_samples: int) -> dict[str, float]:
    """Return the norm over the tensor-parallel ranks of the finished gradient of every weight that learns, by name."""
    state = start(config, FixedPlan.of(config, rows))
    (wrapped,) = state.wrapped
    wrapped.zero_grad_buffer()
    run_micro_batches(
        state,
        [batches_of(config, state.rank, rows, make_samples(num_samples), 0)],
        seq_length=config.data.seq_length,
        num_datasets=len(DATASETS),
        device=CPU,
        forward_only=False,
    )
    squares = {
        name: weight.main_grad.double().square().sum()
        for name, weight in state.chunks[0].named_parameters()
        if weight.requires_grad
    }
    for name, weight in state.chunks[0].named_parameters():
        if getattr(weight, "tensor_model_parallel", False) and name in squares:
            torch.distributed.all_reduce(squares[name])  # only tensor-parallel ranks run
    return {name: float(square.sqrt()) for name, square in squares.items()}
