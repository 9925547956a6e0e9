"""Run a global batch forward and backward: its losses, and gradients that the optimizer can take."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_vlm.data.loading.batch import BadImage, VLMBatch
from megatron_vlm.parallel.groups import RankLayout, seed_everything
from megatron_vlm.platform.step_phases import StepPhase, phase
from megatron_vlm.training.batch_counts import BatchCounts, CountedBatches
from megatron_vlm.training.clipping import ready_gradients
from megatron_vlm.training.objective import Objective
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.totals import Totals, sum_over_ranks


def forward_step(
    batches: CountedBatches, model: Any, *, objective: Objective, num_datasets: int
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """Run one micro-batch through this stage, as megatron-core's schedules call it."""
    batch = next(batches)
    return objective.forward(model, batch), partial(objective.reduce, batch=batch, num_datasets=num_datasets)


def run_micro_batches(
    state: TrainState,
    loaders: Sequence[Iterator[VLMBatch]],
    *,
    seq_length: int,
    num_datasets: int,
    device: torch.device,
    forward_only: bool,
) -> tuple[list[Tensor], list[BatchCounts]]:
    """Run one global batch through the pipeline.

    Args:
        state: the run; gradients are accumulated unless `forward_only`.
        loaders: one iterator of micro-batches for each model chunk of this rank.
        seq_length: length of a row [tokens].
        num_datasets: datasets of the blend.
        device: where the batches go.
        forward_only: whether no gradients are computed.

    Returns:
        The sums that the objective logs for each micro-batch, on ranks of the last stage; and for each chunk, what its
        micro-batches contained.
    """
    counts = [BatchCounts(state.rank_slice()) for _ in loaders]
    iterators = [CountedBatches(batches, count, device) for batches, count in zip(loaders, counts, strict=True)]
    sums = get_forward_backward_func()(
        forward_step_func=partial(forward_step, objective=state.objective, num_datasets=num_datasets),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(state.wrapped) if len(state.wrapped) > 1 else state.wrapped[0],
        num_microbatches=state.layout.num_micro_batches,
        seq_length=state.config.training.micro_batch_size * seq_length,
        micro_batch_size=1,  # the rows of a micro-batch are one packed sequence
        forward_only=forward_only,
    )
    return sums, counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """A global batch whose gradients the optimizer can take."""

    totals: Totals
    """Sums over the ranks, with the norm of the gradient."""
    grad_norm: Tensor
    """The norm on the device, for `clipped_update`."""
    bad_images: list[BadImage]
    """Images that this rank could not read."""


def compute_gradients(
    state: TrainState,
    loaders: Sequence[Iterator[VLMBatch]],
    *,
    device: torch.device,
    stop_requested: bool,
    num_datasets: int | None = None,
) -> Computed:
    """Compute the gradients of the next step, always from the same random state, and update nothing.

    Args:
        state: the run.
        loaders: one iterator of micro-batches for each model chunk of this rank.
        device: where the batches go.
        stop_requested: whether this rank was told to stop.
        num_datasets: into how many losses the batches divide theirs; None: those of the run's datasets.
    """
    num_datasets = len(state.dataset_names) if num_datasets is None else num_datasets
    seed_everything(seed_of_step(state.config.training.seed, state.iteration, state.rank))
    for chunk in state.wrapped:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    seq_length = state.plan.seq_length(state.iteration)
    with phase(StepPhase.FORWARD_BACKWARD):
        sums, counts = run_micro_batches(
            state, loaders, seq_length=seq_length, num_datasets=num_datasets, device=device, forward_only=False
        )
    grad_norm = ready_gradients(state.optimizer, device)
    totals = sum_over_ranks(
        sums,
        counts,
        state.rank,
        num_datasets=num_datasets,
        stop_requested=stop_requested,
        device=device,
        grad_norm=grad_norm,
    )
    bad_images = [image for count in counts for image in count.bad_images]
    return Computed(totals=totals, grad_norm=grad_norm, bad_images=bad_images)


def seed_of_step(seed: int, iteration: int, rank: RankLayout) -> int:
    """Return a seed of its own for each step, pipeline stage and rank with positions of its own.

    Tensor-parallel ranks share it.
    """
    text = f"{seed} {iteration} {rank.dp_rank * rank.cp_size + rank.cp_rank} {rank.pp_rank}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
