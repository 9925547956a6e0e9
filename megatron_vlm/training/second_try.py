"""Compute a step that is not finite once more, which tells a transient fault from a lasting one."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_vlm.config import NumericError, StorageError
from megatron_vlm.parallel.groups import seed_everything
from megatron_vlm.platform.files.durable import open_durably, storage_errors, write_durably
from megatron_vlm.platform.launch.heartbeat import Phase, beat
from megatron_vlm.training.blend import OpenBlend
from megatron_vlm.training.events import note_event
from megatron_vlm.training.gradients import Computed, compute_gradients, seed_of_step
from megatron_vlm.training.sample_losses import SampleLoss, losses_by_sample
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.totals import Totals, check_samples

logger = logging.getLogger(__name__)

NOT_FINITE_FOLDER = "not_finite"
TRANSIENT_FAULT = "transient_fault"
"""Kind of the event of a step that is not finite at first only."""


def compute_again(state: TrainState, first: Totals, blend: OpenBlend | None, *, device: torch.device) -> Computed:
    """Compute a step again from the same weights, samples and random state; all ranks call it together.

    Where it is not finite again, `not_finite/` of the run folder gets the samples of the batch with the loss of each,
    and the random state of each rank at the beginning of the step. Where it is finite, it gets a note of both results.

    Args:
        state: the run, before the update.
        first: the result that is not finite.
        blend: the data; None: nothing can be computed again.
        device: where the batches go.

    Raises:
        NumericError: the second result is not finite either.
    """
    number = state.iteration + 1
    name, value = _what_is_not_finite(first)
    if blend is None:
        fix = "resume from the last checkpoint with a lower learning rate"
        raise NumericError(f"{name} is {value} at iteration {number}", fix=fix)
    if state.is_reporter:
        logger.warning("%s is %s at iteration %d: the step is computed again from the same state", name, value, number)
    beat(Phase.FIRST_STEP)
    loaders = blend.start_loaders(state, device, state.iteration)
    try:
        computed = compute_gradients(state, loaders, device=device, stop_requested=first.stop_requested)
    finally:
        for loader in loaders:
            loader.close()
    second = computed.totals
    batch = f"iteration {number}, computed again,"
    check_samples(second, state.plan, state.iteration, state.rank, num_chunks=len(loaders), batch=batch)
    record = {"iteration": number, "plan": state.plan.hash, "first": _numbers(first), "second": _numbers(second)}
    if second.is_finite:
        if state.is_reporter:
            _write(state, {**record, "is_transient": True}, f"iteration_{number:07d}.json")
            again = second.loss if name == "loss" else second.grad_norm
            what = f"{name} was {value} at iteration {number}, and is {again!r} when computed again: a transient fault"
            logger.warning("%s; the run goes on", what)
            note_event(state, TRANSIENT_FAULT, what)
        return computed
    beat(Phase.FIRST_STEP)
    samples, _ = losses_by_sample(state, blend, device)
    bad = [sample for sample in samples if not sample.is_finite]
    if state.is_reporter:
        listed = [dataclasses.asdict(sample) for sample in samples]
        _write(state, {**record, "is_transient": False, "samples": listed}, f"iteration_{number:07d}.json")
    _write_random_state(state, number)
    name, value = _what_is_not_finite(second)
    raise NumericError(
        f"{name} is {value} at iteration {number}, also when computed again{_named(bad)}",
        where=str(Path(state.config.run_dir) / NOT_FINITE_FOLDER),
        fix=f"resume with a lower learning rate, or look at its samples with data inspect --iteration {number}",
    )


def _what_is_not_finite(totals: Totals) -> tuple[str, float]:
    return ("grad_norm", totals.grad_norm) if totals.loss is None or np.isfinite(totals.loss) else ("loss", totals.loss)


def _numbers(totals: Totals) -> dict[str, Any]:
    return {"loss": repr(totals.loss), "grad_norm": repr(totals.grad_norm)}


def _named(bad: list[SampleLoss]) -> str:
    if not bad:
        return ""
    return f", in {len(bad)} samples, the first with id {bad[0].sample_id}"


def _write(state: TrainState, record: dict[str, Any], name: str) -> None:
    # JSON has no nan: numbers that are not finite are text.
    content = json.dumps(_without_nan(record), indent=1, allow_nan=False) + "\n"
    _write_if_possible(state, "record of the step", lambda folder: write_durably(folder / name, content.encode()))


def _write_if_possible(state: TrainState, what: str, write: Callable[[Path], None]) -> None:
    """Write into `not_finite/`; an error of the disk is only logged: it must not hide what the record is about."""
    folder = Path(state.config.run_dir) / NOT_FINITE_FOLDER
    try:
        with storage_errors(f"{what} cannot be written", folder):
            folder.mkdir(parents=True, exist_ok=True)
            write(folder)
    except StorageError as error:
        logger.warning("%s", error)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return repr(value) if isinstance(value, float) and not np.isfinite(value) else value


def _write_random_state(state: TrainState, number: int) -> None:
    """Write the random state that this rank begins the step with: `iteration_0000012_rank_00003.npz`."""
    seed = seed_of_step(state.config.training.seed, state.iteration, state.rank)
    seed_everything(seed)
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    states |= {f"tracker {name}": one for name, one in get_cuda_rng_tracker().get_states().items()}
    arrays: dict[str, Any] = {name: one.cpu().numpy() for name, one in states.items() if isinstance(one, Tensor)}
    arrays["seed"] = np.int64(seed)

    def write(folder: Path) -> None:
        with open_durably(folder / f"iteration_{number:07d}_rank_{state.rank.rank:05d}.npz") as stream:
            np.savez(stream, **arrays)

    _write_if_possible(state, "random state", write)
