"""Compute one iteration of a run once more, with the loss of each sample; the run and its folder stay as they are."""

import dataclasses
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vlm.config import TrainConfig, UsageError
from megatron_vlm.parallel.collective import decide_on_main
from megatron_vlm.platform.files.metrics import read_metrics
from megatron_vlm.platform.files.run_folder import CONFIG_NAME
from megatron_vlm.platform.launch.heartbeat import Phase, beat
from megatron_vlm.training.blend import OpenBlend, open_planned_blend
from megatron_vlm.training.run import started_rank
from megatron_vlm.training.sample_losses import SampleLoss, losses_by_sample
from megatron_vlm.training.setup import build_state
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import train_step

logger = logging.getLogger(__name__)
# Losses are summed by sample instead of by dataset.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What to compute again."""

    iteration: int
    """Counted from 1."""
    checkpoint: str | None = None
    """Run folder or checkpoint whose weights are used as they are. None: the weights before the iteration, by steps
    from the run's newest checkpoint before it, or from the run's start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What an iteration computed once more gave."""

    samples: list[SampleLoss]
    loss: float | None
    """None if no token of the batch has a loss."""
    grad_norm: float
    compared: str
    """Whether the numbers are those in the run's metrics, in a few words; empty if they cannot be compared."""


def run_replay(config: TrainConfig, replay: Replay) -> Replayed:
    """Replay an iteration on this rank; the reporting rank logs the loss of each sample.

    Raises:
        UserError: the run has no such iteration; or data, checkpoint or settings are wrong.
    """
    with started_rank(config) as (rank, device):
        decide_on_main(lambda: _check_run(config))
        blend = open_planned_blend(config)
        if replay.iteration > blend.plan.num_iterations:
            raise UsageError(
                f"iteration {replay.iteration} of {blend.plan.num_iterations} does not exist", fix="give another"
            )
        beat()
        if replay.checkpoint is not None:
            settings = dataclasses.replace(config.checkpoint, load_weights=replay.checkpoint)
            config = dataclasses.replace(config, checkpoint=settings)
        newest = 0 if replay.checkpoint is not None else replay.iteration - 1
        state = build_state(config, rank, blend.plan, blend.dataset_names, newest=newest)
        if replay.checkpoint is None:
            _repeat_steps(state, blend, replay.iteration - 1, device)
        state.iteration = replay.iteration - 1
        beat(Phase.FIRST_STEP)
        samples, totals = losses_by_sample(state, blend, device)
        beat(Phase.SAVE)
        compared = "" if replay.checkpoint is not None else _compare(state, totals.loss, totals.grad_norm)
        if state.is_reporter:
            for sample in samples:
                logger.info("%s", _line(sample))
            numbers = (replay.iteration, totals.loss, totals.grad_norm, compared)
            logger.info("iteration %d replayed: loss %r, grad norm %r%s", *numbers)
        return Replayed(samples=samples, loss=totals.loss, grad_norm=totals.grad_norm, compared=compared)


def _check_run(config: TrainConfig) -> None:
    """Check that there is a run: a misspelt folder would be filled with the plan of one that never was."""
    if not (Path(config.run_dir) / CONFIG_NAME).is_file():
        raise UsageError(f"run_dir holds no run: it has no {CONFIG_NAME}", where=config.run_dir, fix="correct run_dir")


def _repeat_steps(state: TrainState, blend: OpenBlend, last: int, device: torch.device) -> None:
    """Do the steps up to iteration `last`, without what a run writes beside them."""
    if state.iteration == last:
        return
    if state.is_reporter:
        logger.info("iterations %d to %d are repeated first", state.iteration + 1, last)
    loaders = blend.start_loaders(state, device, state.iteration)
    try:
        beat(Phase.FIRST_STEP, iteration=state.iteration)
        while state.iteration < last:
            train_step(state, loaders, device=device, stop_requested=False)
            state.iteration += 1
            beat(Phase.STEP, iteration=state.iteration)
    finally:
        for loader in loaders:
            loader.close()
    state.gather_parameters()


def _line(sample: SampleLoss) -> str:
    loss = "none" if sample.loss is None else f"{sample.loss:.6f}"
    return (
        f"row {sample.row}: id {sample.sample_id}, {sample.dataset} ({sample.where}), "
        f"{sample.num_labels} labels, loss {loss}"
    )


def _compare(state: TrainState, loss: float | None, grad_norm: float) -> str:
    """Say whether the result is the one in the run's metrics, if these have the iteration."""
    records = read_metrics(Path(state.config.run_dir))
    found = next((record for record in records if record["iteration"] == state.iteration + 1), {})
    if not {"loss", "grad_norm"} <= found.keys():
        return ""
    then, norm_then = found["loss"], found["grad_norm"]
    if _is_close(then, loss) and _is_close(norm_then, grad_norm):
        return ", as recorded"
    return f"; recorded were {then!r} and {norm_then!r}, with other settings, ranks or machines"


def _is_close(then: object, now: float | None) -> bool:
    """Whether a recorded number, or null, is that of the replay."""
    if isinstance(then, float) and now is not None:
        return math.isclose(then, now, rel_tol=_ROUNDING)
    return then is now
