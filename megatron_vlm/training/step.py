"""One optimizer step over one global batch."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_vlm.data.loading.batch import VLMBatch
from megatron_vlm.platform.step_phases import StepPhase, phase, take_phase_seconds, timed_step
from megatron_vlm.training.blend import OpenBlend
from megatron_vlm.training.clipping import clipped_update
from megatron_vlm.training.gradients import Computed, compute_gradients
from megatron_vlm.training.optimizer import set_learning_rate
from megatron_vlm.training.schedule import learning_rate
from megatron_vlm.training.second_try import compute_again
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.totals import Totals, check_samples, losses_by_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Measurements of one step; times are those of this rank, all else is the same on every rank."""

    loss: float | None
    """Mean over all labels of the global batch; None without any, and then the weights stay as they are."""
    grad_norm: float
    lr: float
    dataset_losses: Mapping[str, float]
    """Mean under each name of a dataset that has labels in this batch."""
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


def train_step(
    state: TrainState,
    loaders: Sequence[Iterator[VLMBatch]],
    *,
    device: torch.device,
    stop_requested: bool,
    blend: OpenBlend | None = None,
) -> StepMetrics:
    """Do one optimizer step.

    Args:
        state: the run; weights and optimizer change in place, `iteration` does not.
        loaders: one iterator of micro-batches for each model chunk of this rank.
        device: where the batches go.
        stop_requested: whether this rank was told to stop; all ranks will know.
        blend: the data, to compute a step again that is not finite; None: it is not computed again.

    Raises:
        DataError: more images cannot be read than `data.max_bad_fraction` allows.
        NumericError: loss or gradient norm is not finite, twice if it could be computed again, or the ranks consumed
            samples other than the planned ones. Every rank raises either before its weights and optimizer change.
    """
    start, number = time.perf_counter(), state.iteration + 1
    with timed_step():
        lr = _set_learning_rate(state)
        computed = compute_gradients(state, loaders, device=device, stop_requested=stop_requested)
        totals, batch = computed.totals, f"iteration {number}"
        check_samples(totals, state.plan, state.iteration, state.rank, num_chunks=len(loaders), batch=batch)
        if totals.num_bad_images and state.bad_samples is not None:
            state.bad_samples.note(computed.bad_images, state.dataset_names, number)
        if not totals.is_finite:
            computed = compute_again(state, totals, blend, device=device)
        if computed.totals.loss is not None:
            _update(state, computed)
        elif state.is_reporter:
            # Momentum and weight decay would change the weights, although the batch says nothing about them.
            what = "no token of iteration %d has a loss: the weights stay as they are (data inspect shows its samples)"
            logger.warning(what, number)
    return _metrics(state, computed.totals, lr, time.perf_counter() - start)


def update_weights(
    state: TrainState, loaders: Sequence[Iterator[VLMBatch]], *, device: torch.device, stop_requested: bool
) -> Totals:
    """Do the computation of `train_step` without its checks; returns sums over the ranks."""
    _set_learning_rate(state)
    computed = compute_gradients(state, loaders, device=device, stop_requested=stop_requested)
    _update(state, computed)
    return computed.totals


def _set_learning_rate(state: TrainState) -> float:
    lr = learning_rate(state.config.optimizer, state.iteration, state.train_iters)
    set_learning_rate(state.optimizer, lr)
    return lr


def _update(state: TrainState, computed: Computed) -> None:
    # Nothing waits for the update: the host prepares the next step meanwhile.
    with phase(StepPhase.OPTIMIZER):
        clipped_update(state.optimizer, state.config.optimizer.clip_grad, computed.grad_norm)


def _metrics(state: TrainState, totals: Totals, lr: float, seconds: float) -> StepMetrics:
    return StepMetrics(
        loss=totals.loss,
        grad_norm=totals.grad_norm,
        lr=lr,
        dataset_losses=losses_by_name(state.dataset_names, totals.losses, totals.labels),
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
