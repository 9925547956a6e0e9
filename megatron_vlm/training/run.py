"""A whole run on one rank, from its settings to its last checkpoint."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from megatron_vlm.config import TrainConfig, derive_layout, save_config
from megatron_vlm.data.text.tokenizer_files import read_tokenizer_files
from megatron_vlm.parallel.groups import RankLayout, start_distributed, stop_distributed
from megatron_vlm.platform.device import prepare_process, set_deterministic
from megatron_vlm.platform.files.run_folder import CONFIG_NAME
from megatron_vlm.platform.launch.heartbeat import Phase, beat
from megatron_vlm.platform.launch.launch import STOP_SIGNALS
from megatron_vlm.platform.launch.time_limit import is_time_over
from megatron_vlm.platform.machine import check_capability
from megatron_vlm.training.bad_samples import BadSamples
from megatron_vlm.training.blend import open_training_blend, open_validation_blend, without_plans_of_refused
from megatron_vlm.training.hook import Hook, build_hooks
from megatron_vlm.training.hooks import (
    attempt,
    checkpoint,
    ledger,
    log,
    metrics_file,
    quarantine,
    spikes,
    stop,
    tensorboard,
    validation,
)
from megatron_vlm.training.hooks import blend as blend_change
from megatron_vlm.training.loop import train
from megatron_vlm.training.setup import build_state


def run_training(config: TrainConfig) -> str | None:
    """Train or resume one stage on this rank.

    Returns:
        None if the run reached train_iters, otherwise why it ended earlier (`state.SIGNALLED`,
        `state.EXIT_ITERATION`). In either case, a checkpoint of the last iteration is on disk.

    Raises:
        UserError: data, checkpoint or settings are wrong, a number is not finite, or a rank consumed the wrong samples.
    """
    minutes = config.training.exit_duration_minutes
    with _stop_signals() as is_signalled, started_rank(config) as (rank, device):
        return _run(config, rank, device, lambda: is_signalled() or is_time_over(minutes))


@contextmanager
def started_rank(config: TrainConfig) -> Iterator[tuple[RankLayout, torch.device]]:
    """Make this process a rank of the job: yield its place and its device, and leave the job at the end."""
    device = prepare_process()
    if device.type == "cuda":
        check_capability(config, torch.cuda.get_device_capability(device))
    set_deterministic(config.training.deterministic)
    if config.training.num_threads:
        torch.set_num_threads(config.training.num_threads)
    rank = start_distributed(config.parallel, device)
    beat(Phase.SETUP)
    try:
        derive_layout(config, rank.world_size)
        yield rank, device
    finally:
        stop_distributed()


def _run(config: TrainConfig, rank: RankLayout, device: torch.device, stop_requested: Callable[[], bool]) -> str | None:
    with without_plans_of_refused(config):
        blend, validation_blend = open_training_blend(config), open_validation_blend(config)
        beat()
        state = build_state(config, rank, blend.plan, blend.dataset_names)
    state.quarantine = blend.quarantine
    state.dataset_sizes = blend.dataset_sizes
    beat()
    blends = [blend, *([validation_blend] if validation_blend else [])]
    datasets = [dataset for one in blends for dataset in one.datasets]
    state.bad_samples = BadSamples(Path(config.run_dir), config.data.max_bad_fraction, datasets, state.iteration)
    if rank.rank == 0:
        save_config(config, Path(config.run_dir) / CONFIG_NAME)
        # Generation and conversion then need nothing but the run folder.
        read_tokenizer_files(config.data.tokenizer).copy_to(Path(config.run_dir))
    hooks: list[Hook] = [
        validation.Hook(validation_blend, device=device, stop_requested=stop_requested),
        stop.Hook(),
        attempt.Hook(),
        ledger.Hook(),
        metrics_file.Hook(),
        log.Hook(),
        blend_change.Hook(),
        quarantine.Hook(),
        spikes.Hook(),
        tensorboard.Hook(),
        *build_hooks(config.training.hooks),
        checkpoint.Hook(),
    ]
    loaders = blend.start_loaders(state, device, state.iteration)
    try:
        train(state, loaders, hooks, device=device, stop_requested=stop_requested, blend=blend)
    finally:
        beat(Phase.SAVE)
        for loader in loaders:
            loader.close()
    return state.stop_reason


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the signals that stop a run into a flag that is checked between steps."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
