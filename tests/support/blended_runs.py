"""Runs on prepared shards in this process, between two steps."""

import hashlib
import itertools
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.config import ParallelConfig
from megatron_vlm.parallel.groups import build_groups, rank_layout
from megatron_vlm.training.blend import OpenBlend, open_training_blend
from megatron_vlm.training.setup import build_state
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import train_step
from tests.support.jobs import CPU, step
from tests.support.runs import shard_run


def open_run(shards: Path, run_dir: Path, **settings: Any) -> tuple[TrainState, OpenBlend]:
    """Return the state and the data of a run whose ranks decode their images themselves."""
    data = {"num_workers": 0, **settings.pop("data", {})}
    config = shard_run(shards, run_dir, data=data, **settings)
    blend = open_training_blend(config)
    return build_state(config, rank_layout(), blend.plan, blend.dataset_names), blend


def step_after_a_fault(shards: str, run_dir: str, faulty_rank: int | None, parallel: dict[str, Any]) -> tuple[Any, str]:
    """Do two steps, in the second of which a rank's first loss is nan; return its numbers and a hash of the weights."""
    build_groups(ParallelConfig(**parallel))
    state, blend = open_run(Path(shards), Path(run_dir), parallel=parallel)
    loaders = blend.start_loaders(state, CPU, 0)
    step(state, loaders)
    if state.rank.rank == faulty_rank:
        spoil_losses(state, times=1)
    metrics = train_step(state, loaders, device=CPU, stop_requested=False, blend=blend)
    state.gather_parameters()
    weights = b"".join(value.detach().numpy().tobytes() for value in state.chunks[0].parameters())
    return (metrics.loss, metrics.grad_norm, metrics.sample_ids_sha), hashlib.sha256(weights).hexdigest()


def spoil_losses(state: TrainState, times: int) -> None:
    """Let the losses of the next micro-batches on this rank be nan."""
    reduce, calls = state.objective.reduce, itertools.count()

    def spoiled(*args: Any, **settings: Any) -> tuple[torch.Tensor, ...]:
        loss, labels, sums = reduce(*args, **settings)
        if next(calls) >= times:
            return loss, labels, sums
        return loss * float("nan"), labels, sums * torch.tensor([[float("nan")], [1.0]])

    state.objective.reduce = spoiled  # type: ignore[method-assign]
