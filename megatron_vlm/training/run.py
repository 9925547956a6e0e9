"""A run from its settings to its last checkpoint: what a worker process does."""

import logging
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from megatron_vlm.config import TrainConfig, derive_layout, save_config
from megatron_vlm.data.loading.collate import Collation
from megatron_vlm.data.loading.loader import BatchLoader, LoaderWorkers
from megatron_vlm.data.plan.ledger import Ledger
from megatron_vlm.data.plan.plan import Plan, PlanSettings, build_plan, open_plan
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.text.tokenizer import MODEL_FILE
from megatron_vlm.parallel.collective import main_rank_first
from megatron_vlm.parallel.groups import RankLayout, start_distributed, stop_distributed
from megatron_vlm.platform.device import prepare_process
from megatron_vlm.platform.files.run_folder import CONFIG_NAME
from megatron_vlm.training.hooks import LogHook, save_hook, stop_hook
from megatron_vlm.training.loop import Hook, train
from megatron_vlm.training.metrics import MetricsWriter
from megatron_vlm.training.setup import build_state
from megatron_vlm.training.state import TrainState

logger = logging.getLogger(__name__)

PLAN_FOLDER, LEDGER_FOLDER = "plan", "ledger"
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def run_training(config: TrainConfig) -> str | None:
    """Train, or resume, one stage on this rank.

    Returns:
        None when train_iters is reached, otherwise why the run ended before it (`hooks.SIGNALLED`,
        `hooks.EXIT_ITERATION`); a checkpoint of the last iteration is on disk in either case.

    Raises:
        UserError: data, checkpoint or settings are wrong, or a number is not finite.
    """
    device = prepare_process()
    if config.training.num_threads:
        torch.set_num_threads(config.training.num_threads)
    with _stop_signals() as stop_requested:
        rank = start_distributed(config.parallel, device)
        try:
            return _run(config, rank, device, stop_requested)
        finally:
            stop_distributed()


def _run(config: TrainConfig, rank: RankLayout, device: torch.device, stop_requested: Callable[[], bool]) -> str | None:
    derive_layout(config, rank.world_size)
    datasets = [ShardedDataset.open(entry.path) for entry in config.data.blend]
    plan = _open_plan(config, datasets, rank)
    state = build_state(config, rank, plan, [dataset.manifest.source for dataset in datasets])
    if rank.rank == 0:
        save_config(config, Path(config.run_dir) / CONFIG_NAME)
        # The run folder is all that generation and conversion need, wherever they are started.
        shutil.copyfile(config.data.tokenizer, Path(config.run_dir) / MODEL_FILE)
    loaders = [_build_loader(state, plan, datasets, device, has_tower=chunk.pre_process) for chunk in state.chunks]
    hooks: list[Hook] = [stop_hook, save_hook]
    writer = ledger = None
    if state.is_reporter:
        writer = MetricsWriter(config.run_dir, state.iteration)
        ledger = Ledger(Path(config.run_dir) / LEDGER_FOLDER, plan, state.iteration)
        hooks.insert(0, LogHook(writer, ledger))
    try:
        train(state, loaders, hooks, device=device, stop_requested=stop_requested)
    finally:
        for resource in (*loaders, writer, ledger):
            if resource is not None:
                resource.close()
    return state.stop_reason


def _open_plan(config: TrainConfig, datasets: Sequence[ShardedDataset], rank: RankLayout) -> Plan:
    """Let the first rank build the plan, or find it, and all others open it."""
    settings, folder = PlanSettings.from_config(config), Path(config.run_dir) / PLAN_FOLDER
    with main_rank_first():
        return (build_plan if rank.rank == 0 else open_plan)(settings, datasets, folder)


def _build_loader(
    state: TrainState, plan: Plan, datasets: Sequence[ShardedDataset], device: torch.device, *, has_tower: bool
) -> BatchLoader:
    data = state.config.data
    return BatchLoader(
        datasets,
        plan,
        collation=Collation.from_config(state.config.model, data),
        start_iteration=state.iteration,
        rank_slice=state.rank_slice(has_tower=has_tower),
        workers=LoaderWorkers(
            # Without images there is nothing to decode: a few memory-mapped reads a batch need no process of their own.
            num_workers=data.num_workers if has_tower else 0,
            prefetch_factor=data.prefetch_factor,
            pin_memory=device.type == "cuda",
        ),
    )


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM and SIGUSR1 into a flag that is looked at between steps."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, note) for number in _STOP_SIGNALS}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
