"""One optimizer step over one global batch."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_vlm.config import NumericError
from megatron_vlm.data.loading.batch import VLMBatch
from megatron_vlm.parallel.groups import RankLayout, seed_everything
from megatron_vlm.platform.step_phases import StepPhase, phase, take_phase_seconds, timed_step
from megatron_vlm.training.batch_counts import BatchCounts, CountedBatches
from megatron_vlm.training.clipping import clipped_update, ready_gradients
from megatron_vlm.training.objective import Objective
from megatron_vlm.training.optimizer import set_learning_rate
from megatron_vlm.training.schedule import learning_rate
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.totals import Totals, check_samples, means, sum_over_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Measurements of one step; times are those of this rank, all else is the same on every rank."""

    loss: float
    """Mean over all labels of the global batch."""
    grad_norm: float
    lr: float
    dataset_losses: tuple[float, ...]
    """Mean of each dataset; nan for one without labels in this batch."""
    num_labels: int
    num_tokens: int
    """Positions that are not padding."""
    num_positions: int
    num_images: int
    attention_pairs: int
    """Query-key pairs of causal attention inside the samples."""
    dataset_samples: tuple[int, ...]
    """Of each dataset; of a long sample, only its first fragment counts."""
    dataset_tokens: tuple[int, ...]
    """Of each dataset, without padding."""
    images_of_ranks: tuple[int, ...]
    """Images in the rows of each data-parallel rank."""
    data_wait: float
    """Mean time that a data-parallel rank waited for its batches [s]."""
    seconds: float
    phase_seconds: Mapping[StepPhase, float]
    """Of this rank; see `platform.step_phases`."""
    ended_at: float
    """On this rank [Unix time]."""
    stop_requested: bool
    """Whether a rank was told to stop."""
    sample_ids_sha: str
    """Hash of the samples that the ranks consumed."""


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


def train_step(
    state: TrainState, loaders: Sequence[Iterator[VLMBatch]], *, device: torch.device, stop_requested: bool
) -> StepMetrics:
    """Do one optimizer step.

    Args:
        state: the run; weights and optimizer change in place, `iteration` does not.
        loaders: one iterator of micro-batches for each model chunk of this rank.
        device: where the batches go.
        stop_requested: whether this rank was told to stop; all ranks will know.

    Raises:
        NumericError: loss or gradient norm is not finite, or the ranks consumed samples other than the planned ones.
            Every rank raises it before its weights and its optimizer change.
    """
    start, number = time.perf_counter(), state.iteration + 1
    num_chunks, batch = len(loaders), f"iteration {number}"

    def approve(totals: Totals) -> None:
        check_samples(totals, state.plan, state.iteration, state.rank, num_chunks=num_chunks, batch=batch)
        _check_finite(totals, number)

    with timed_step():
        totals, lr = update_weights(state, loaders, device=device, stop_requested=stop_requested, approve=approve)
    return _metrics(totals, lr, time.perf_counter() - start)


def update_weights(
    state: TrainState,
    loaders: Sequence[Iterator[VLMBatch]],
    *,
    device: torch.device,
    stop_requested: bool,
    approve: Callable[[Totals], object] = lambda totals: None,
) -> tuple[Totals, float]:
    """Do the computation of `train_step`.

    Args:
        state: as there.
        loaders: as there.
        device: as there.
        stop_requested: as there.
        approve: looks at the sums before a weight or the optimizer changes; what it raises keeps them as they are.

    Returns:
        Sums over the ranks, with the norm of the gradient, and the learning rate.
    """
    config, num_datasets = state.config, len(state.dataset_names)
    seed_everything(_seed_of_step(config.training.seed, state.iteration, state.rank))
    lr = learning_rate(config.optimizer, state.iteration, state.train_iters)
    set_learning_rate(state.optimizer, lr)
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
    approve(totals)
    # Nothing waits for the update: the host prepares the next step meanwhile.
    with phase(StepPhase.OPTIMIZER):
        clipped_update(state.optimizer, config.optimizer.clip_grad, grad_norm)
    return totals, lr


def _seed_of_step(seed: int, iteration: int, rank: RankLayout) -> int:
    """Return a seed of its own for each step, pipeline stage and rank with positions of its own.

    Tensor-parallel ranks share it.
    """
    text = f"{seed} {iteration} {rank.dp_rank * rank.cp_size + rank.cp_rank} {rank.pp_rank}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def _metrics(totals: Totals, lr: float, seconds: float) -> StepMetrics:
    loss, dataset_losses = means(totals.losses, totals.labels)
    return StepMetrics(
        loss=loss,
        grad_norm=totals.grad_norm,
        lr=lr,
        dataset_losses=dataset_losses,
        num_labels=int(sum(totals.labels)),
        num_tokens=totals.num_tokens,
        num_positions=totals.num_positions,
        num_images=totals.num_images,
        attention_pairs=totals.attention_pairs,
        dataset_samples=totals.dataset_samples,
        dataset_tokens=totals.dataset_tokens,
        images_of_ranks=totals.images_of_ranks,
        data_wait=totals.data_wait,
        seconds=seconds,
        phase_seconds=take_phase_seconds(),
        ended_at=time.time(),
        stop_requested=totals.stop_requested,
        sample_ids_sha=f"{totals.sample_hash:016x}",
    )


def _check_finite(totals: Totals, iteration: int) -> None:
    loss, _ = means(totals.losses, totals.labels)
    for name, value in (("loss", loss), ("grad_norm", totals.grad_norm)):
        if not isfinite(value):
            raise NumericError(
                f"{name} is {value} at iteration {iteration}",
                fix="resume from the last checkpoint with a lower learning rate, or inspect its samples in ledger/",
            )
