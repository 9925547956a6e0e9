"""Open the datasets of a blend and their plan, and start loaders on them."""

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vlm.config import TrainConfig, UserError, position_multiple
from megatron_vlm.data.loading.collate import Collation
from megatron_vlm.data.loading.loader import BatchLoader
from megatron_vlm.data.loading.quarantine import Quarantine, read_quarantine
from megatron_vlm.data.loading.workers import LoaderWorkers
from megatron_vlm.data.plan.plan import Plan, build_plan, open_plan
from megatron_vlm.data.plan.settings import PlanSettings
from megatron_vlm.data.shards.dataset import ShardedDataset, sizes_by_name
from megatron_vlm.parallel.collective import main_rank_first
from megatron_vlm.platform.files.run_folder import CONFIG_NAME, PLAN_FOLDER
from megatron_vlm.training.state import TrainState

# Fixed, so that runs with different training seeds are validated on the same batches.
_VALIDATION_SEED = 0


@dataclass(frozen=True, slots=True)
class OpenBlend:
    """The data of training or of validation."""

    datasets: Sequence[ShardedDataset]
    plan: Plan
    quarantine: Quarantine = Quarantine()
    """Samples to leave out."""

    @property
    def dataset_names(self) -> list[str]:
        """Name of each dataset, under which its loss is reported."""
        return [dataset.manifest.dataset_name for dataset in self.datasets]

    @property
    def dataset_sizes(self) -> dict[str, int]:
        """Samples of each dataset, by name."""
        return sizes_by_name(self.datasets)

    def start_loaders(
        self, state: TrainState, device: torch.device, start_iteration: int, *, by_sample: bool = False
    ) -> list[BatchLoader]:
        """Start a loader for each model chunk of this rank at an iteration of the plan; the caller closes them.

        Args:
            state: the run.
            device: where the batches go.
            start_iteration: iterations already consumed.
            by_sample: as in `BatchLoader`; such loaders decode nothing ahead.
        """
        return [
            self._start_loader(state, device, start_iteration, chunk.pre_process, by_sample) for chunk in state.chunks
        ]

    def _start_loader(
        self, state: TrainState, device: torch.device, start_iteration: int, has_tower: bool, by_sample: bool
    ) -> BatchLoader:
        data = state.config.data
        return BatchLoader(
            self.datasets,
            self.plan,
            collation=Collation.from_config(state.config.model, data, position_multiple(state.config)),
            quarantine=self.quarantine.ids,
            start_iteration=start_iteration,
            rank_slice=state.rank_slice(has_tower=has_tower),
            by_sample=by_sample,
            workers=LoaderWorkers(
                # Without images there is nothing to decode, and a few memory-mapped reads need no process.
                num_workers=data.num_workers if has_tower and not by_sample else 0,
                prefetch_factor=data.prefetch_factor,
                pin_memory=device.type == "cuda",
            ),
        )


def open_training_blend(config: TrainConfig) -> OpenBlend:
    """Open `data.blend`; all ranks call it together.

    Raises:
        UserError: a dataset is missing or damaged, or the plan cannot be made or written.
    """
    return _with_quarantine(config, _open(config, PlanSettings.from_config(config)))


@contextmanager
def without_plans_of_refused(config: TrainConfig) -> Iterator[None]:
    """Remove the plans that the block wrote into the folder of an earlier run if it ends with a UserError.

    The next start of a run that has not begun wants the same ones, which may have taken long.
    """
    run_dir = Path(config.run_dir)
    folder = run_dir / PLAN_FOLDER
    is_mine = torch.distributed.get_rank() == 0 and (run_dir / CONFIG_NAME).is_file()
    before = set(folder.iterdir()) if folder.is_dir() else None
    try:
        yield
    except UserError:
        if is_mine and folder.is_dir():
            for path in [folder] if before is None else set(folder.iterdir()) - before:
                shutil.rmtree(path, ignore_errors=True)
        raise


def open_planned_blend(config: TrainConfig) -> OpenBlend:
    """Open `data.blend` with the plan in the run folder, which is written already; no other rank is asked.

    Raises:
        UserError: a dataset or the plan is missing or damaged.
    """
    settings = PlanSettings.from_config(config)
    datasets = [ShardedDataset.open(entry.path) for entry in settings.datasets]
    blend = OpenBlend(datasets, open_plan(settings, datasets, Path(config.run_dir) / PLAN_FOLDER))
    return _with_quarantine(config, blend)


def _with_quarantine(config: TrainConfig, blend: OpenBlend) -> OpenBlend:
    path = config.data.quarantine
    return blend if path is None else dataclasses.replace(blend, quarantine=read_quarantine(path, blend.plan))


def open_validation_blend(config: TrainConfig) -> OpenBlend | None:
    """Open `data.validation`; None if it is empty. Raises as `open_training_blend`."""
    if not config.data.validation:
        return None
    iterations = config.training.validation_iters
    settings = dataclasses.replace(
        PlanSettings.from_config(config),
        blend=config.data.validation,
        seed=_VALIDATION_SEED,
        train_iters=iterations,
        train_epochs=1.0 if iterations is None else None,
    )
    return _open(config, settings)


def _open(config: TrainConfig, settings: PlanSettings) -> OpenBlend:
    datasets = [ShardedDataset.open(entry.path) for entry in settings.datasets]
    folder = Path(config.run_dir) / PLAN_FOLDER
    with main_rank_first():
        is_main = torch.distributed.get_rank() == 0
        plan = (build_plan if is_main else open_plan)(settings, datasets, folder)
    return OpenBlend(datasets, plan)
