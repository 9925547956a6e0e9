"""Prepare a run for its next step: start it anew, from another run's weights, or resume it."""

import logging
from collections.abc import Sequence

import torch

from megatron_vlm.checkpoint.base import find_base, record_base
from megatron_vlm.checkpoint.folder import checkpoint_path
from megatron_vlm.checkpoint.load import load_weights, resume
from megatron_vlm.config import CheckpointError, ConfigError, TrainConfig, derive_layout
from megatron_vlm.data.plan.plan import Plan
from megatron_vlm.models.build import build_model, start_adapter
from megatron_vlm.models.computation import Computation
from megatron_vlm.parallel.collective import decide_on_main
from megatron_vlm.parallel.groups import RankLayout, seed_everything
from megatron_vlm.training.objective import build_objective
from megatron_vlm.training.optimizer import build_optimizer, wrap_model
from megatron_vlm.training.seen import Seen
from megatron_vlm.training.state import TrainState

logger = logging.getLogger(__name__)


def build_state(
    config: TrainConfig, rank: RankLayout, plan: Plan, dataset_names: Sequence[str], *, newest: int | None = None
) -> TrainState:
    """Build model and optimizer, and load the checkpoint that the run starts from.

    Args:
        config: the run.
        rank: this rank.
        plan: of the training data.
        dataset_names: one for each entry of the blend.
        newest: as in `resume`.

    Raises:
        CheckpointError: the checkpoint to load is missing, damaged or belongs to another model.
        ConfigError: the run's checkpoint was trained on data, or with a model, other than the config names.
    """
    state = build_random_state(config, rank, plan, dataset_names)
    _load(state, newest)
    if state.is_reporter:
        _log_parameters(state)
    return state


def build_random_state(config: TrainConfig, rank: RankLayout, plan: Plan, dataset_names: Sequence[str]) -> TrainState:
    """Build model and optimizer with random weights, before any step."""
    seed_everything(config.training.seed)
    computation = Computation.from_config(config.training)
    chunks = build_model(config.model, config.parallel, computation, config.training.freeze)
    wrapped = wrap_model(config, chunks)
    optimizer = build_optimizer(config, wrapped)
    return TrainState(
        config=config,
        layout=derive_layout(config, rank.world_size),
        rank=rank,
        chunks=chunks,
        wrapped=wrapped,
        optimizer=optimizer,
        objective=build_objective(config.training.objective),
        plan=plan,
        dataset_names=dataset_names,
    )


def _load(state: TrainState, newest: int | None) -> None:
    resumed = resume(state.config, state.chunks, state.optimizer, newest=newest)
    if resumed is not None:
        manifest, state.damaged_checkpoints = resumed.manifest, resumed.damaged
        _take_progress(state, manifest.progress)
        if manifest.base is not None:
            run_dir = state.config.run_dir
            state.base = record_base(find_base(checkpoint_path(run_dir, state.iteration), manifest.base), run_dir)
        if state.is_reporter:
            logger.info("resumed at iteration %d", state.iteration)
        return
    state.config.check_start()
    path, adapter = state.config.checkpoint.load_weights, state.config.model.adapter
    if path is None:
        return
    # The checkpoints of a run with an adapter leave what rests to its base, so it must fit as it is.
    loaded = load_weights(
        path, state.chunks, state.config.model, may_add_adapter=True, resizes_positions=adapter is None
    )
    if adapter is not None:
        state.base = record_base(loaded.checkpoint, state.config.run_dir)
        if not loaded.has_adapter:
            start_adapter(adapter, state.chunks)
    # The optimizer keeps copies of the weights (FP32 masters, shards), which must follow.
    state.optimizer.reload_model_params()
    if state.is_reporter:
        logger.info("start from the weights of %s", loaded.checkpoint)


def _take_progress(state: TrainState, progress: dict) -> None:
    if not progress:
        raise CheckpointError(
            "the run's newest checkpoint holds only weights",
            where=state.config.run_dir,
            fix="name it in checkpoint.load_weights and train in another run_dir",
        )
    if progress["plan_hash"] != state.plan.hash:
        _check_continues(state, progress)
    # Checkpoints of earlier versions lack it.
    state.consumed_hash = progress.get("consumed_hash") or state.plan.consumed_hash(progress["iteration"])
    state.iteration = progress["iteration"]
    state.consumed_samples = progress["consumed_samples"]
    seen = progress.get("seen")
    state.seen = None if seen is None else Seen.from_dict(seen)


def _check_continues(state: TrainState, progress: dict) -> None:
    """Check that the new plan starts with the batches already trained on: only what follows may change."""
    plan, iteration = state.plan, progress["iteration"]
    if progress.get("plan_data_hash") != plan.hashes.data:
        _check_past(state, progress)
        if state.is_reporter:
            logger.info("data.blend has changed: the first %d iterations are those of the run", iteration)
        return
    alike = min(progress["plan_stable_iterations"], plan.stable_iterations)
    if iteration > alike:
        raise ConfigError(
            f"the run has done {iteration} iterations, and the plans of {progress['train_iters']} and "
            f"{plan.num_iterations} iterations agree only in the first {alike}",
            where=state.config.run_dir,
            fix="restore the length of the training, or start another run_dir from its weights",
        )
    if state.is_reporter and plan.num_iterations != progress["train_iters"]:
        logger.warning(
            "train_iters changes from %d to %d: from iteration %d on, the learning rate follows the new length",
            progress["train_iters"],
            plan.num_iterations,
            iteration + 1,
        )


def _check_past(state: TrainState, progress: dict) -> None:
    """Check that steps of the blend changed only after the iterations already done, which the new plan repeats."""
    plan, iteration = state.plan, progress["iteration"]
    datasets = tuple(progress.get("plan_datasets", ()))
    # Checkpoints of earlier versions lack all three; with the blend as it was, they go on.
    if progress.get("plan_settings_hash") != plan.hashes.settings or plan.hashes.datasets[: len(datasets)] != datasets:
        raise ConfigError(
            f"the run was trained on data plan {progress['plan_hash'][:12]}, the config now gives {plan.hash[:12]}"
            f"{_left_out(plan)}",
            where=state.config.run_dir,
            fix="restore data, seed, batch size and length of the training, or start another run_dir from its weights"
            if "plan_settings_hash" in progress
            else "restore data, seed and batch size; data.blend may get steps after the next checkpoint is saved",
        )
    is_alike = iteration <= plan.num_iterations and decide_on_main(
        lambda: plan.consumed_hash(iteration) == progress["consumed_hash"]
    )
    if not is_alike:
        raise ConfigError(
            f"data.blend now gives other samples for the {iteration} iterations that the run has done",
            where=state.config.run_dir,
            fix=f"restore its steps up to there; a new one may begin with from_iteration={iteration + 1} or later",
        )


def _left_out(plan: Plan) -> str:
    # A run of an earlier version may have its own plan, under its own settings, and only with these.
    number = plan.nothing_to_train
    return f", which leaves out {number} samples with nothing_to_train, as earlier versions did not" if number else ""


def _log_parameters(state: TrainState) -> None:
    parameters = [p for chunk in state.chunks for p in chunk.parameters()]
    learning = sum(p.numel() for p in parameters if p.requires_grad)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    logger.info(
        "%d ranks (%s): %s; this rank holds %.2fM parameters, %.2fM learn; %d iterations",
        state.rank.world_size,
        device,
        state.config.parallel.describe(state.rank.dp_size),
        sum(p.numel() for p in parameters) / 1e6,
        learning / 1e6,
        state.train_iters,
    )
