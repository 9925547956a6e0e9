"""What the ranks of distributed tests run; `WorkerPool.run` names these functions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_vlm.checkpoint.optimizer_state import inner_optimizers
from megatron_vlm.checkpoint.save import save_checkpoint
from megatron_vlm.config import CheckpointConfig, TrainConfig
from megatron_vlm.data.batch import ImageShare, VLMBatch
from megatron_vlm.data.collate import Collation, PlacedSample, collate
from megatron_vlm.parallel.groups import RankLayout, build_groups, rank_layout
from megatron_vlm.training.setup import build_state
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import train_step
from tests.support.samples import make_samples

CPU = torch.device("cpu")
SOURCES = ("even", "odd")


@dataclass(frozen=True)
class FixedPlan:
    """Stands for a plan whose rows the test gives itself."""

    num_iterations: int
    hash: str = "fixed"


@dataclass(frozen=True)
class Steps:
    """What a job measured."""

    losses: list[float]
    grad_norms: list[float]
    source_losses: list[tuple[float, ...]]
    adam_steps: list[float]
    """Distinct step counts of the optimizer at the end."""


def start(config: TrainConfig) -> TrainState:
    """Build groups, model and optimizer on this rank, and load what the config names."""
    build_groups(config.parallel)
    return build_state(config, rank_layout(), FixedPlan(config.training.train_iters), SOURCES)


def batches_of(
    config: TrainConfig, rank: RankLayout, rows: Sequence[Sequence[int]], samples: Sequence[PlacedSample], first: int
) -> Iterator[VLMBatch]:
    """Yield this rank's micro-batches of every global batch from iteration `first` on."""
    size, micro = config.training.global_batch_size, config.training.micro_batch_size
    share = ImageShare(rank.tp_rank, rank.tp_size) if rank.is_first_stage else None
    collation = Collation.from_config(config.model, config.data)
    for begin in range(first * size, len(rows), size):
        mine = list(rows[begin : begin + size])[rank.dp_rank :: rank.dp_size]
        for index in range(0, len(mine), micro):
            yield collate([[samples[i] for i in row] for row in mine[index : index + micro]], collation, share)


def train_steps(
    config: TrainConfig,
    rows: Sequence[Sequence[int]],
    *,
    num_samples: int,
    num_steps: int,
    max_images: int = 3,
    save: bool = False,
) -> Steps:
    """Do steps over given rows, after loading what the config names; save at the end if asked to."""
    state = start(config)
    samples = make_samples(num_samples, max_images=max_images)
    loaders = [batches_of(config, state.rank, rows, samples, state.iteration) for _ in state.chunks]
    measured = [_step(state, loaders) for _ in range(num_steps)]
    if save:
        save_checkpoint(config, state.chunks, state.optimizer, state.progress())
    return Steps(
        losses=[metrics.loss for metrics in measured],
        grad_norms=[metrics.grad_norm for metrics in measured],
        source_losses=[metrics.source_losses for metrics in measured],
        adam_steps=_adam_steps(state),
    )


def _step(state: TrainState, loaders: Sequence[Iterator[VLMBatch]]) -> Any:
    metrics = train_step(state, loaders, device=CPU, stop_requested=False)
    state.iteration += 1
    state.consumed_samples += state.config.training.global_batch_size
    return metrics


def _adam_steps(state: TrainState) -> list[float]:
    steps = [
        float(entry["step"])
        for inner in inner_optimizers(state.optimizer)
        if getattr(inner, "optimizer", None) is not None
        for entry in inner.optimizer.state.values()
    ]
    return sorted(set(steps))


def save_initial(config: TrainConfig) -> None:
    """Save the random weights that a layout of one rank starts from."""
    state = start(config)
    save_checkpoint(config, state.chunks, state.optimizer, state.progress())


def starting_from(config: TrainConfig, path: str) -> TrainConfig:
    """Return the config with the weights of `path` to load."""
    return replace(config, checkpoint=CheckpointConfig(load_weights=path))


def train_steps_without_borders(config: TrainConfig, rows: Sequence[Sequence[int]], *, num_samples: int) -> Steps:
    """Do one step in which every row is one segment: the negative control of packing."""
    state = start(config)
    batches = batches_of(config, state.rank, rows, make_samples(num_samples), 0)
    merged = (
        replace(
            batch,
            cu_seqlens=torch.tensor([0, config.data.seq_length], dtype=torch.int32),
            max_seqlen=config.data.seq_length,
        )
        for batch in batches
    )
    metrics = _step(state, [merged])
    return Steps([metrics.loss], [metrics.grad_norm], [metrics.source_losses], [])
