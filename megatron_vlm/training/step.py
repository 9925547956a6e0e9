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
from megatron_vlm.data.plan.row_hash import HASH_BITS, hash_rows
from megatron_vlm.parallel.groups import seed_everything
from megatron_vlm.training.batch_counts import BatchCounts, CountedBatches
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
    dataset_losses: tuple[float, ...]
    """Mean by dataset; nan for one without labels in this batch."""
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
    sample_ids_sha: str
    """Hash of the samples that the ranks consumed."""


def packed_seq_params(batch: VLMBatch) -> PackedSeqParams:
    """Return the sample borders of a batch as megatron-core wants them."""
    borders, longest = batch.cu_seqlens, batch.max_seqlen
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def forward_step(batches: CountedBatches, model: Any, num_datasets: int) -> tuple[Tensor, Any]:
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
    return output, partial(reduce_losses, label_datasets=batch.label_datasets, num_datasets=num_datasets)


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
        NumericError: loss or gradient norm is not finite, or the ranks consumed other samples than those of the plan.
    """
    start = time.perf_counter()
    config, num_datasets = state.config, len(state.dataset_names)
    seed_everything((config.training.seed * _SEED_STRIDE + state.iteration) % 2**31)
    lr = learning_rate(config.optimizer, state.iteration, state.train_iters)
    set_learning_rate(state.optimizer, lr)
    for chunk in state.wrapped:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    pad_token_id = config.model.language.pad_token_id
    counts = [BatchCounts(pad_token_id, state.rank_slice()) for _ in loaders]
    iterators = [CountedBatches(batches, count, device) for batches, count in zip(loaders, counts, strict=True)]
    sums = get_forward_backward_func()(
        forward_step_func=partial(forward_step, num_datasets=num_datasets),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(state.wrapped) if len(state.wrapped) > 1 else state.wrapped[0],
        num_microbatches=state.layout.num_micro_batches,
        seq_length=config.training.micro_batch_size * state.plan.seq_length(state.iteration),
        micro_batch_size=1,  # the rows of a micro-batch are one packed sequence
        forward_only=False,
    )
    _, grad_norm, _ = state.optimizer.step()
    totals = _sum_over_ranks(state, sums, counts, stop_requested, device)
    _check_samples(state, totals, num_chunks=len(loaders))
    metrics = _metrics(totals, float(grad_norm or 0.0), lr, time.perf_counter() - start)
    _check_finite(metrics, state.iteration + 1)
    return metrics


@dataclass(frozen=True, slots=True)
class _Totals:
    """What the ranks know together."""

    losses: list[float]
    """Sum of the losses of each dataset."""
    labels: list[float]
    """Labels of each dataset."""
    counts: list[float]
    """Tokens, positions, images and attention pairs."""
    data_wait: float
    stop_requested: bool
    sample_hash: int
    """Of the samples whose loss was computed."""
    sample_hash_of_all: int
    """Sum over all ranks and their model chunks, which each got the samples on their own."""


def _sum_over_ranks(
    state: TrainState, sums: list[Tensor], counts: list[BatchCounts], stop_requested: bool, device: torch.device
) -> _Totals:
    """Sum over all ranks what each of them knows: one collective a step."""
    num_datasets, rank = len(state.dataset_names), state.rank
    losses = torch.zeros(2 * num_datasets, dtype=torch.float64, device=device)
    counted, sample_hash = [0.0] * 4, 0
    if rank.is_last_stage and rank.tp_rank == 0:
        for part in sums:
            losses += part.flatten()
        last = counts[-1]
        counted = [last.num_tokens, last.num_positions, last.num_images, last.attention_pairs]
        sample_hash = last.sample_hash
    data_wait = counts[-1].data_wait / rank.dp_size if rank.is_first_stage and rank.tp_rank == 0 else 0.0
    hash_of_all = sum(count.sample_hash for count in counts) % (1 << HASH_BITS)
    measured = [*counted, data_wait, float(stop_requested), *_halves(sample_hash), *_halves(hash_of_all)]
    totals = torch.cat([losses, torch.tensor(measured, dtype=torch.float64, device=device)])
    torch.distributed.all_reduce(totals)
    values = totals.tolist()  # the one wait of the host for the device in a step
    rest = values[2 * num_datasets :]
    return _Totals(
        losses=values[:num_datasets],
        labels=values[num_datasets : 2 * num_datasets],
        counts=rest[:4],
        data_wait=rest[4],
        stop_requested=rest[5] > 0,
        sample_hash=_whole(*rest[6:8]),
        sample_hash_of_all=_whole(*rest[8:10]),
    )


def _halves(value: int) -> tuple[float, float]:
    """Split a hash so that float64 sums of both halves are exact over two million ranks."""
    high, low = divmod(value, 1 << 32)
    return float(high), float(low)


def _whole(high: float, low: float) -> int:
    return ((int(high) << 32) + int(low)) % (1 << HASH_BITS)


def _check_samples(state: TrainState, totals: _Totals, num_chunks: int) -> None:
    """Check, alike on every rank, that the samples consumed are those of the plan, each in its place."""
    planned = hash_rows(*state.plan.rows(state.iteration), range(state.config.training.global_batch_size))
    copies = state.rank.tp_size * state.rank.pp_size * num_chunks
    if (totals.sample_hash, totals.sample_hash_of_all) == (planned, planned * copies % (1 << HASH_BITS)):
        return
    what = f"with hash {totals.sample_hash:016x}"
    if totals.sample_hash == planned:
        what = "on a rank that computes no loss"
    raise NumericError(
        f"the samples consumed at iteration {state.iteration + 1} {what} are not those of the plan, {planned:016x}",
        where=state.config.run_dir,
        fix="start the same command again; it resumes before this step. If it happens again, it is a bug of the loader",
    )


def _metrics(totals: _Totals, grad_norm: float, lr: float, seconds: float) -> StepMetrics:
    tokens, positions, images, pairs = totals.counts
    num_labels = sum(totals.labels)
    return StepMetrics(
        loss=sum(totals.losses) / num_labels if num_labels else 0.0,
        grad_norm=grad_norm,
        lr=lr,
        dataset_losses=tuple(s / c if c else float("nan") for s, c in zip(totals.losses, totals.labels, strict=True)),
        num_labels=int(num_labels),
        num_tokens=int(tokens),
        num_positions=int(positions),
        num_images=int(images),
        attention_pairs=int(pairs),
        data_wait=totals.data_wait,
        seconds=seconds,
        stop_requested=totals.stop_requested,
        sample_ids_sha=f"{totals.sample_hash:016x}",
    )


def _check_finite(metrics: StepMetrics, iteration: int) -> None:
    for name in ("loss", "grad_norm"):
        value = getattr(metrics, name)
        if value != value or value in (float("inf"), float("-inf")):
            raise NumericError(
                f"{name} is {value} at iteration {iteration}",
                fix="resume from the last checkpoint with a lower learning rate, or look at the samples in ledger/",
            )
