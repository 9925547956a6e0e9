"""What the ranks of distributed tests run; `WorkerPool.run` names these functions."""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_vlm.checkpoint.adam_state import adams
from megatron_vlm.checkpoint.load import load_weights
from megatron_vlm.checkpoint.save import save_checkpoint
from megatron_vlm.config import (
    CheckpointConfig,
    DataError,
    NumericError,
    ParallelConfig,
    TrainConfig,
    position_multiple,
)
from megatron_vlm.data.loading.batch import VLMBatch
from megatron_vlm.data.loading.collate import Collation, PlacedSample, collate
from megatron_vlm.data.plan.plan import PlanHashes
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.parallel import collective
from megatron_vlm.parallel.collective import decide_on_main, in_sight, main_rank_first
from megatron_vlm.parallel.groups import RankLayout, build_groups, rank_layout, seed_everything
from megatron_vlm.parallel.slicing import RankSlice
from megatron_vlm.training.batch_counts import BatchCounts, CountedBatches
from megatron_vlm.training.gradients import forward_step, run_micro_batches
from megatron_vlm.training.hooks import checkpoint
from megatron_vlm.training.objective import build_objective
from megatron_vlm.training.optimizer import build_optimizer, wrap_model
from megatron_vlm.training.setup import build_state
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import StepMetrics, train_step
from megatron_vlm.training.totals import Totals, sum_over_ranks
from tests.support.configs import tiny_run
from tests.support.samples import make_samples, pictures_then_text

CPU = torch.device("cpu")
DATASETS = ("even", "odd")


@dataclass(frozen=True)
class InSight:
    """What a rank saw of `in_sight`."""

    signs: int
    """Signs of life that it gave."""
    seconds: float
    """Until it went on."""
    outcome: str


def work_in_sight(steps_of: Sequence[Sequence[float]], *, fails: bool = False, rounds: int = 1000) -> InSight:
    """Get on after each of a rank's numbers of seconds; the last rank may then fail."""
    rank, signs = torch.distributed.get_rank(), []

    def work(get_on: Callable[[], None]) -> str:
        for seconds in steps_of[rank]:
            time.sleep(seconds)
            get_on()
        if fails and rank == len(steps_of) - 1:
            raise DataError("failed", fix="none")
        return f"done {rank}"

    begin = time.monotonic()
    with mock.patch.multiple(collective, _ROUND_SECONDS=0.1, _MAX_SILENT_ROUNDS=rounds):
        try:
            outcome = in_sight(work, lambda: signs.append(rank))
        except DataError as error:
            outcome = error.what
    return InSight(len(signs), time.monotonic() - begin, outcome)


@dataclass(frozen=True)
class FixedPlan:
    """Stands for a plan whose rows the test gives itself."""

    num_iterations: int
    row_lengths: Sequence[int]
    """Of each iteration; the last one goes on."""
    hash: str = "fixed"
    hashes: PlanHashes = PlanHashes("fixed", "fixed", ("fixed",))
    nothing_to_train: int = 0
    stable_iterations: int = 100
    planned_rows: Sequence[Sequence[int]] = ()
    """Samples of the rows of all iterations."""
    global_batch_size: int = 1

    @classmethod
    def of(cls, config: TrainConfig, rows: Sequence[Sequence[int]] = (), **changes: Any) -> "FixedPlan":
        settings = {
            "num_iterations": config.training.train_iters,
            "row_lengths": (config.data.seq_length,),
            "planned_rows": rows,
            "global_batch_size": config.training.global_batch_size,
        }
        return cls(**{**settings, **changes})

    def seq_length(self, iteration: int) -> int:
        return self.row_lengths[min(iteration, len(self.row_lengths) - 1)]

    def datasets_until(self, iteration: int) -> tuple[str, ...]:
        return self.hashes.datasets

    def consumed_hash(self, iteration: int) -> str:
        return f"{self.hash} {iteration}"

    def rows(self, iteration: int) -> tuple[np.ndarray, np.ndarray]:
        size = self.global_batch_size
        rows = self.planned_rows[iteration * size : (iteration + 1) * size]
        ids = [sample for row in rows for sample in row]
        return np.array(ids, dtype=np.int64), np.array([len(row) for row in rows], dtype=np.int64)


@dataclass(frozen=True)
class Steps:
    """What a job measured."""

    losses: list[float]
    grad_norms: list[float]
    dataset_losses: list[Mapping[str, float]]
    sample_ids_shas: list[str]
    adam_steps: list[float]
    """Distinct step counts of the optimizer at the end."""


def start(config: TrainConfig, plan: FixedPlan | None = None) -> TrainState:
    """Build groups, model and optimizer on this rank, and load what the config names."""
    build_groups(config.parallel)
    return build_state(config, rank_layout(), plan or FixedPlan.of(config), DATASETS)


def batches_of(
    config: TrainConfig,
    rank: RankLayout,
    rows: Sequence[Sequence[int]],
    samples: Sequence[PlacedSample],
    first: int,
    plan: FixedPlan | None = None,
) -> Iterator[VLMBatch]:
    """Yield this rank's micro-batches of every global batch from iteration `first` on."""
    plan = plan or FixedPlan.of(config)
    size, micro = config.training.global_batch_size, config.training.micro_batch_size
    split = config.parallel.vision_tensor_parallel
    share = rank.image_share(vision_tensor_parallel=split) if rank.is_first_stage else None
    collation = Collation.from_config(config.model, config.data, position_multiple(config))
    for begin in range(first * size, len(rows), size):
        mine = list(rows[begin : begin + size])[rank.dp_rank :: rank.dp_size]
        collation = replace(collation, seq_length=plan.seq_length(begin // size))
        for index in range(0, len(mine), micro):
            picked = [[samples[i] for i in row] for row in mine[index : index + micro]]
            yield collate(picked, collation, share, rank.context_share)


def train_steps(
    config: TrainConfig,
    rows: Sequence[Sequence[int]],
    *,
    num_samples: int,
    num_steps: int,
    max_images: int = 3,
    save: bool = False,
    row_lengths: Sequence[int] = (),
) -> Steps:
    """Do steps over given rows, after loading what the config names; save at the end if asked to."""
    plan = FixedPlan.of(config, rows, **({"row_lengths": tuple(row_lengths)} if row_lengths else {}))
    state = start(config, plan)
    samples = make_samples(num_samples, max_images=max_images)
    loaders = [batches_of(config, state.rank, rows, samples, state.iteration, plan) for _ in state.chunks]
    measured = [step(state, loaders) for _ in range(num_steps)]
    if save:
        _save(state)
    return Steps(
        losses=[metrics.loss for metrics in measured],
        grad_norms=[metrics.grad_norm for metrics in measured],
        dataset_losses=[metrics.dataset_losses for metrics in measured],
        sample_ids_shas=[metrics.sample_ids_sha for metrics in measured],
        adam_steps=_adam_steps(state),
    )


def gradients_with_padding(
    config: TrainConfig, rows: Sequence[Sequence[int]], *, num_samples: int, token: int | None
) -> dict[str, str]:
    """Return hashes of the losses and of every gradient of a global batch, with `token` in the place of padding."""
    state = start(config, FixedPlan.of(config, rows))
    padding, filled = config.model.language.pad_token_id, 0

    def batches() -> Iterator[VLMBatch]:
        nonlocal filled
        for batch in batches_of(config, state.rank, rows, make_samples(num_samples), 0):
            is_padding = batch.input_ids == padding
            filled += int(is_padding.sum())
            yield batch if token is None else replace(batch, input_ids=batch.input_ids.masked_fill(is_padding, token))

    for chunk in state.wrapped:
        chunk.zero_grad_buffer()
    sums, _ = run_micro_batches(
        state,
        [batches()],
        seq_length=config.data.seq_length,
        num_datasets=len(DATASETS),
        device=CPU,
        forward_only=False,
    )
    assert filled
    values = {name: weight.main_grad for name, weight in state.chunks[0].named_parameters()}  # type: ignore[attr-defined]
    values["losses"] = torch.stack(sums)
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in values.items()}


def step_with_a_wrong_rank(config: TrainConfig, rows: Sequence[Sequence[int]], wrong_rank: int) -> str:
    """Do one step in which one rank is given a wrong sample, and return the error that this rank raises."""
    state = start(config, FixedPlan.of(config, rows))
    batches = batches_of(config, state.rank, rows, make_samples(4), 0)
    if state.rank.rank == wrong_rank:
        batches = (replace(batch, sample_ids=batch.sample_ids + 1) for batch in batches)
    try:
        step(state, [batches])
    except NumericError as error:
        return str(error)
    return "no error"


def step(state: TrainState, loaders: Sequence[Iterator[VLMBatch]]) -> StepMetrics:
    """Do one step and count it."""
    metrics = train_step(state, loaders, device=CPU, stop_requested=False)
    state.iteration += 1
    state.consumed_samples += state.config.training.global_batch_size
    return metrics


def _save(state: TrainState) -> None:
    state.gather_parameters()
    save_checkpoint(state.config, state.chunks, state.optimizer, state.progress(), state.base)


def _adam_steps(state: TrainState) -> list[float]:
    # torch's Adam counts for each parameter, transformer-engine's for each group.
    steps = [
        float(adam.state[parameter].get("step", group.get("step", 0)))
        for adam in adams(state.optimizer)
        for group in adam.param_groups
        for parameter in group["params"]
    ]
    return sorted(set(steps))


def save_after_steps(config: TrainConfig, rows: Sequence[Sequence[int]]) -> None:
    """Do a step for each global batch of `rows`; the checkpoint hook saves after the last one."""
    state = start(config, FixedPlan.of(config, rows))
    loader, hook = batches_of(config, state.rank, rows, make_samples(8), 0), checkpoint.Hook()
    for _ in range(len(rows) // config.training.global_batch_size):
        hook.step(state, step(state, [loader]))


def save_initial(config: TrainConfig) -> None:
    """Save the random weights that a layout of one rank starts from."""
    _save(start(config))


def starting_from(config: TrainConfig, path: str) -> TrainConfig:
    """Return the config with the weights of `path` to load."""
    return replace(config, checkpoint=CheckpointConfig(load_weights=path))


def train_steps_without_borders(config: TrainConfig, rows: Sequence[Sequence[int]], *, num_samples: int) -> Steps:
    """Do one step in which every row is one segment: the negative control of packing."""
    state = start(config, FixedPlan.of(config, rows))
    batches = batches_of(config, state.rank, rows, make_samples(num_samples), 0)
    merged = (
        replace(
            batch,
            cu_seqlens=torch.tensor([0, batch.input_ids.numel()], dtype=torch.int32),
            max_seqlen=batch.input_ids.numel(),
        )
        for batch in batches
    )
    metrics = step(state, [merged])
    return Steps([metrics.loss], [metrics.grad_norm], [metrics.dataset_losses], [metrics.sample_ids_sha], [])


def gradients_of_one_step(
    config: TrainConfig, rows: Sequence[Sequence[int]], also_freeze: Sequence[str] = ()
) -> dict[str, float]:
    """Return the norm over all ranks of the finished gradient of every part, by name; frozen parts are left out.

    Args:
        config: the run; its distributed optimizer gives every data-parallel rank a shard of the gradients.
        rows: the global batch, of `pictures_then_text`.
        also_freeze: names of parameters begin with them.
    """
    build_groups(config.parallel)
    seed_everything(config.training.seed)
    rank = rank_layout()
    (chunk,) = build_model(config.model, config.parallel, Computation.from_config(config.training))
    load_weights(config.checkpoint.load_weights, [chunk])
    for name, parameter in chunk.named_parameters():
        if name.startswith((*config.training.freeze, *also_freeze)):
            parameter.requires_grad_(False)
    (wrapped,) = wrap_model(config, [chunk])
    build_optimizer(config, [wrapped])
    # The first pass reduces gradients at its end; from the second on, a bucket is reduced as soon as it is ready.
    for _ in range(2):
        wrapped.zero_grad_buffer()
        _forward_and_backward(config, wrapped, rank, rows)
    _clear_shards_of_others(wrapped)
    squares: dict[str, torch.Tensor] = {}
    for name, parameter in chunk.named_parameters():
        if parameter.requires_grad:
            part = ".".join(name.split(".")[:4])
            square = parameter.main_grad.double().square().sum()
            if not getattr(parameter, "tensor_model_parallel", False):
                square = square / rank.tp_size
            squares[part] = squares.get(part, torch.zeros((), dtype=torch.float64)) + square
    for square in squares.values():
        torch.distributed.all_reduce(square)
    return {name: float(square.sqrt()) for name, square in squares.items()}


def _forward_and_backward(
    config: TrainConfig, wrapped: DistributedDataParallel, rank: RankLayout, rows: Sequence[Sequence[int]]
) -> None:
    batches = batches_of(config, rank, rows, pictures_then_text(), 0)
    objective = build_objective(config.training.objective)
    get_forward_backward_func()(
        forward_step_func=partial(forward_step, objective=objective, num_datasets=len(DATASETS)),
        data_iterator=CountedBatches(batches, BatchCounts(RankSlice()), CPU),
        model=wrapped,
        num_microbatches=len(rows) // rank.dp_size,
        seq_length=config.data.seq_length,
        micro_batch_size=1,
        forward_only=False,
    )


def _clear_shards_of_others(wrapped: DistributedDataParallel) -> None:
    """Set the gradients to zero that a reduce-scatter does not finish on this rank."""
    for group in wrapped.bucket_groups:
        for bucket in group.buckets:
            shards = bucket.grad_data.view(group.intra_distributed_optimizer_instance_size, -1)
            mine = shards[group.intra_distributed_optimizer_instance_rank].clone()
            shards.zero_()
            shards[group.intra_distributed_optimizer_instance_rank] = mine


def describe_rank(parallel: ParallelConfig) -> RankLayout:
    """Return where this rank stands."""
    build_groups(parallel)
    return rank_layout()


def fail_on_main() -> str:
    """Return the error that this rank raises when the first rank fails."""
    build_groups(ParallelConfig())
    rank = rank_layout()
    try:
        with main_rank_first():
            if rank.rank == 0:
                raise DataError("data is missing", where="shard 3", fix="prepare it")
    except DataError as error:
        return str(error)
    return "no error"


def write_then_read(path: str) -> str:
    """Let the first rank write a file, slower than collectives may be, and every rank return what it holds."""
    build_groups(ParallelConfig())
    rank = rank_layout()
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=0.2))
    with main_rank_first():
        if rank.rank == 0:
            time.sleep(0.5)
            Path(path).write_text("built")
        return Path(path).read_text()


def decide(fails: bool) -> str:
    """Return what the first rank decides, or its error."""

    def look() -> str:
        if fails:
            raise DataError("nothing is there")
        return f"rank {torch.distributed.get_rank()}"

    try:
        return decide_on_main(look)
    except DataError as error:
        return error.what


def sum_counts(parallel: ParallelConfig) -> Totals:
    """Sum counts that differ by rank: rank r waited r + 1 seconds and has a loss of r + 1; the last is told to stop."""
    build_groups(parallel)
    place = rank_layout()
    counts = BatchCounts(
        RankSlice(),
        num_tokens=10,
        num_positions=20,
        num_images=1 + 2 * place.rank,
        attention_pairs=55,
        dataset_samples=Counter({1: place.rank + 1}),
        dataset_tokens=Counter({0: 4, 1: 6}),
        data_wait=float(place.rank + 1),
        sample_hash=2**63 + place.rank,
    )
    sums = [torch.tensor([[place.rank + 1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)]
    is_last = place.rank == place.world_size - 1
    return sum_over_ranks(sums, [counts], place, num_datasets=2, stop_requested=is_last, device=CPU)


def averaged_replicas(piece_size: int) -> tuple[list[float], list[float]]:
    """Average gradients of a tower that differ between two tensor-parallel ranks; return them and what they must be."""
    from megatron_vlm.training import finish_gradients

    run = tiny_run()
    parallel = replace(run.parallel, tensor_model_parallel_size=2)
    state = start(replace(run, parallel=parallel))
    rank, usual = torch.distributed.get_rank(), finish_gradients._PIECE_SIZE
    parameters = list(state.chunks[0].vision_model.parameters())
    for number, parameter in enumerate(parameters):
        parameter.main_grad.fill_(number + rank)  # type: ignore[attr-defined]
    finish_gradients._PIECE_SIZE = piece_size
    try:
        finish_gradients.average_replicas(state.wrapped)
    finally:
        finish_gradients._PIECE_SIZE = usual
    found = [parameter.main_grad.mean().item() for parameter in parameters]  # type: ignore[attr-defined]
    return found, [number + 0.5 for number in range(len(parameters))]
