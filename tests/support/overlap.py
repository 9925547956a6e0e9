"""Jobs whose gradients and weights travel in several buckets while the ranks compute."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from megatron_vlm.config import TrainConfig
from megatron_vlm.training.gradients import run_micro_batches
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.validation import VALIDATION_LOSS, validation_losses
from tests.support.jobs import CPU, DATASETS, FixedPlan, batches_of, start, step
from tests.support.old_behaviour import skipping_empty_shares
from tests.support.samples import pictures_then_text

Rows = Sequence[Sequence[int]]
# Buckets smaller than the tiny model's embedding: tower and projection are in several of their own.
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 3000}


@dataclass(frozen=True)
class Measured:
    """What a job measured at each step."""

    losses: list[float]
    grad_norms: list[float]
    validation_losses: list[float]
    num_buckets: int


def train_and_validate(config: TrainConfig, rows: Rows, *, num_steps: int) -> Measured:
    """Do steps over the same global batch of `pictures_then_text`, and validate on it after each of them."""
    plan = FixedPlan.of(config, rows * num_steps)
    state, samples = start(config, plan), pictures_then_text()
    loader = batches_of(config, state.rank, rows * num_steps, samples, 0)
    blend: Any = SimpleNamespace(
        dataset_names=DATASETS,
        datasets=DATASETS,
        plan=FixedPlan.of(config, rows, num_iterations=1),
        start_loaders=lambda state, device, start_iteration: [batches_of(config, state.rank, rows, samples, 0)],
    )
    steps, validations = [], []
    for _ in range(num_steps):
        steps.append(step(state, [loader]))
        losses = validation_losses(state, blend, device=CPU, stop_requested=lambda: False)
        assert losses is not None
        validations.append(losses[VALIDATION_LOSS])
    return Measured(
        losses=[metrics.loss for metrics in steps],
        grad_norms=[metrics.grad_norm for metrics in steps],
        validation_losses=validations,
        num_buckets=len(state.wrapped[0].bucket_groups),
    )


def order_of_collectives(config: TrainConfig, rows: Rows, *, skip_empty_shares: bool = False) -> list[tuple[str, int]]:
    """Return the gathers and reductions that this rank starts, each with its bucket, over two passes.

    None of them is carried out, so that ranks that do not agree do not wait for each other.
    """
    state, samples = start(config, FixedPlan.of(config, rows)), pictures_then_text()
    order: list[tuple[str, int]] = []
    for number, group in enumerate(state.wrapped[0].bucket_groups):
        group.start_param_sync = partial(_start, order, "gather", number, group)
        group.start_grad_sync = partial(_start, order, "reduce", number, group)
    with skipping_empty_shares() if skip_empty_shares else nullcontext():
        # The first pass reduces at its end; from the second on, a bucket is reduced as soon as it is ready.
        for _ in range(2):
            _pass(state, batches_of(config, state.rank, rows, samples, 0))
    return order


def _pass(state: TrainState, batches: Any) -> None:
    state.wrapped[0].zero_grad_buffer()
    run_micro_batches(
        state,
        [batches],
        seq_length=state.config.data.seq_length,
        num_datasets=len(DATASETS),
        device=CPU,
        forward_only=False,
    )


def _start(order: list[tuple[str, int]], kind: str, number: int, group: Any, **settings: Any) -> None:
    """Stand for the start of a collective of one of megatron-core's bucket groups, as far as the group can tell."""
    if kind == "reduce" and group.grad_reduce_handle is not None:
        return
    order.append((kind, number))
    handle = SimpleNamespace(wait=lambda: None)
    if kind == "reduce":
        group.grad_reduce_handle = handle
    else:
        group.param_gather_handle, group.param_gather_dispatched = handle, True
