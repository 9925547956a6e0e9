"""One optimizer step over one global batch."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_vlm.config import NumericError
from megatron_vlm.data.loading.batch import VLMBatch
from megatron_vlm.parallel.groups import seed_everything
from megatron_vlm.training.objectives.language_modelling import reduce_losses
from megatron_vlm.training.optimizer import set_learning_rate
from megatron_vlm.training.schedule import learning_rate
from megatron_vlm.training.state import TrainState

# Any odd constant: neighbouring iterations and neighbouring seeds get different streams.
_SEED_STRIDE = 1_000_003


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """What one step measured, the same on every rank."""

    loss: float
    """Mean over all labels of the global batch."""
    grad_norm: float
    lr: float
    source_losses: tuple[float, ...]
    """Mean by source; nan for a source without labels in this batch."""
    num_labels: int
    num_tokens: int
    """Positions that hold something."""
    num_positions: int
    num_images: int
    attention_pairs: int
    """Query-key pairs of causal attention inside the samples."""
    data_wait: float
    """Mean time that a data-parallel rank waited for its batches [s]."""
    seconds: float
    stop_requested: bool
    """Whether a rank was told to stop."""


@dataclass(slots=True)
class _Counts:
    """What this rank saw of the batch in one step."""

    pad_token_id: int
    num_tokens: int = 0
    num_positions: int = 0
    num_images: int = 0
    attention_pairs: int = 0
    data_wait: float = 0.0

    def add(self, batch: VLMBatch) -> None:
        # A segment may end with padding; one that is nothing else counts as 0 tokens.
        filled = (batch.input_ids[0] != self.pad_token_id).cumsum(0)
        lengths = torch.cat([filled.new_zeros(1), filled[batch.cu_seqlens[1:].long() - 1]]).diff().double()
        self.num_tokens += batch.num_tokens
        self.num_positions += batch.input_ids.numel()
        self.num_images += batch.num_images
        self.attention_pairs += int((lengths * (lengths + 1) / 2).sum())


class _TimedIterator:
    """Hands batches on, counting on the host what they hold and how long they took to come."""

    def __init__(self, batches: Iterator[VLMBatch], counts: _Counts, device: torch.device) -> None:
        self.batches, self.counts, self.device = batches, counts, device

    def __next__(self) -> VLMBatch:
        start = time.perf_counter()
        batch = next(self.batches)
        self.counts.data_wait += time.perf_counter() - start
        self.counts.add(batch)
        return batch.to(self.device, non_blocking=True) if self.device.type != "cpu" else batch


def packed_seq_params(batch: VLMBatch) -> PackedSeqParams:
    """Return the sample borders of a batch as megatron-core wants them."""
    borders, longest = batch.cu_seqlens, batch.max_seqlen
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def forward_step(batches: _TimedIterator, model: Any, num_sources: int) -> tuple[Tensor, Any]:
    """Run one micro-batch through this stage, as megatron-core's schedules call it."""
    batch = next(batches)
    output = model(
        batch.input_ids,
        batch.pixel_values,
        batch.image_token_index,
        num_images=batch.num_images,
        labels=batch.labels,
        label_index=batch.label_index,
        packed_seq_params=packed_seq_params(batch),
    )
    return output, partial(reduce_losses, label_datasets=batch.label_datasets, num_sources=num_sources)


def train_step(
    state: TrainState, loaders: Sequence[Iterator[VLMBatch]], *, device: torch.device, stop_requested: bool
) -> StepMetrics:
    """Do one optimizer step.

    Args:
        state: the run; weights and optimizer change in place, `iteration` does not.
        loaders: one iterator of micro-batches for each model chunk of this rank.
        device: where the batches go.
        stop_requested: whether this rank was told to stop; all ranks learn of it.

    Raises:
        NumericError: loss or gradient norm is not finite.
    """
    start = time.perf_counter()
    config, num_sources = state.config, len(state.source_names)
    seed_everything((config.training.seed * _SEED_STRIDE + state.iteration) % 2**31)
    lr = learning_rate(config.optimizer, state.iteration, state.train_iters)
    set_learning_rate(state.optimizer, lr)
    for chunk in state.wrapped:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    counts = [_Counts(config.model.language.pad_token_id) for _ in loaders]
    iterators = [_TimedIterator(batches, count, device) for batches, count in zip(loaders, counts, strict=True)]
    sums = get_forward_backward_func()(
        forward_step_func=partial(forward_step, num_sources=num_sources),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(state.wrapped) if len(state.wrapped) > 1 else state.wrapped[0],
        num_microbatches=state.layout.num_micro_batches,
        seq_length=config.training.micro_batch_size * state.plan.seq_length(state.iteration),
        micro_batch_size=1,  # the rows of a micro-batch are one packed sequence
        forward_only=False,
    )
    _, grad_norm, _ = state.optimizer.step()
    totals = _sum_over_ranks(state, sums, counts[-1], stop_requested, device)
    metrics = _metrics(totals, num_sources, float(grad_norm or 0.0), lr, time.perf_counter() - start)
    _check_finite(metrics, state.iteration + 1)
    return metrics


def _sum_over_ranks(
    state: TrainState, sums: list[Tensor], counts: _Counts, stop_requested: bool, device: torch.device
) -> list[float]:
    """Sum over the data-parallel ranks what the first tensor-parallel rank of a stage knows: one collective a step."""
    num_sources, rank = len(state.source_names), state.rank
    totals = torch.zeros(2 * num_sources + 6, dtype=torch.float64, device=device)
    if rank.is_last_stage and rank.tp_rank == 0:
        for part in sums:
            totals[: 2 * num_sources] += part.flatten()
        measured = [counts.num_tokens, counts.num_positions, counts.num_images, counts.attention_pairs]
        totals[2 * num_sources : 2 * num_sources + 4] = torch.tensor(measured, dtype=torch.float64)
    if rank.is_first_stage and rank.tp_rank == 0:
        totals[-2] = counts.data_wait / rank.dp_size
    totals[-1] = float(stop_requested)
    torch.distributed.all_reduce(totals)
    return totals.tolist()  # the one wait of the host for the device in a step


def _metrics(totals: list[float], num_sources: int, grad_norm: float, lr: float, seconds: float) -> StepMetrics:
    sums, counts = totals[:num_sources], totals[num_sources : 2 * num_sources]
    tokens, positions, images, pairs, data_wait, stop = totals[2 * num_sources :]
    num_labels = sum(counts)
    return StepMetrics(
        loss=sum(sums) / num_labels if num_labels else 0.0,
        grad_norm=grad_norm,
        lr=lr,
        source_losses=tuple(s / c if c else float("nan") for s, c in zip(sums, counts, strict=True)),
        num_labels=int(num_labels),
        num_tokens=int(tokens),
        num_positions=int(positions),
        num_images=int(images),
        attention_pairs=int(pairs),
        data_wait=data_wait,
        seconds=seconds,
        stop_requested=stop > 0,
    )


def _check_finite(metrics: StepMetrics, iteration: int) -> None:
    for name in ("loss", "grad_norm"):
        value = getattr(metrics, name)
        if value != value or value in (float("inf"), float("-inf")):
            raise NumericError(
                f"{name} is {value} at iteration {iteration}",
                fix="resume from the last checkpoint with a lower learning rate, or look at the samples in ledger/",
            )
