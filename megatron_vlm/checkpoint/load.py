"""Find the checkpoint that a run starts from and load it: its own newest valid one, or the weights of another run."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

from megatron_vlm.checkpoint.base import with_bases
from megatron_vlm.checkpoint.folder import (
    checkpoint_path,
    checkpoints_folder,
    clean_up,
    find_checkpoint,
    list_iterations,
)
from megatron_vlm.checkpoint.manifest import Manifest, find_faults, find_strangers, read_manifest
from megatron_vlm.checkpoint.pickles import check_metadata
from megatron_vlm.checkpoint.run_settings import check_resume, check_start
from megatron_vlm.checkpoint.sharded_state import load_all, load_model
from megatron_vlm.config import CheckpointError, ModelConfig, TrainConfig
from megatron_vlm.parallel.collective import decide_on_main, in_sight
from megatron_vlm.platform.launch.heartbeat import beat

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Resumed:
    """What `resume` loaded."""

    manifest: Manifest
    damaged: Mapping[str, str]
    """First fault of each newer checkpoint that was passed over, by its name."""


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """What `load_weights` read."""

    checkpoint: Path
    has_adapter: bool
    """Whether it had the weights of the adapter, or the model has no adapter."""


def resume(
    config: TrainConfig, chunks: Sequence[MegatronModule], optimizer: MegatronOptimizer, *, newest: int | None = None
) -> Resumed | None:
    """Load the newest valid checkpoint of the run's own folder; all ranks call it together.

    Whatever a killed save left in the folder is cleaned up first, unless there is a bound: then it is only read.

    Args:
        config: the run.
        chunks: of this rank.
        optimizer: of this rank.
        newest: pass over checkpoints of later iterations; None: there is no bound.

    Returns:
        What was loaded; None if the run has no checkpoint yet.

    Raises:
        CheckpointError: there are checkpoints, but none is valid: a run never starts over on its own; or the base of
            the newest valid one is missing, damaged or another one.
        ConfigError: the run goes on with another model than it was trained with; see `check_resume`.
    """
    found = _newest_valid(Path(config.run_dir), newest)
    if found is None:
        return None
    path = checkpoint_path(config.run_dir, found.manifest.iteration)
    _check_whole(with_bases(path)[1:])
    decide_on_main(lambda: check_resume(path, config))
    num_extra_states = load_all(path, chunks, optimizer)
    if config.training.fp8 and config.training.fp8_recipe == "delayed" and not num_extra_states:
        logger.warning("checkpoint %s has no history of FP8 scales; delayed scaling starts a new one", path)
    return found


def load_weights(
    path: str,
    chunks: Sequence[MegatronModule],
    model: ModelConfig | None = None,
    *,
    may_add_adapter: bool = False,
    resizes_positions: bool = False,
) -> LoadedWeights:
    """Verify and load only the weights of a run folder or checkpoint; all ranks call it together.

    Args:
        path: run folder or checkpoint.
        chunks: of this rank.
        model: its settings; None: they are those of the checkpoint.
        may_add_adapter: as in `load_model`.
        resizes_positions: as in `load_model`.

    Raises:
        CheckpointError: there is no checkpoint, it or its base is damaged, or it belongs to another model.
        ConfigError: the weights mean something else in the model; see `check_start`.
    """
    checkpoint = Path(decide_on_main(lambda: str(find_checkpoint(path))))
    _check_whole(with_bases(checkpoint))
    if model is not None:
        decide_on_main(lambda: check_start(checkpoint, model))
    has_adapter = load_model(checkpoint, chunks, may_add_adapter=may_add_adapter, resizes_positions=resizes_positions)
    return LoadedWeights(checkpoint, has_adapter)


def _check_whole(checkpoints: Sequence[Path]) -> None:
    for checkpoint in checkpoints:
        faults = _verify_together(checkpoint, read_manifest(checkpoint))
        if faults:
            raise CheckpointError(
                f"checkpoint is damaged: {faults[0]}", where=str(checkpoint), fix="use another checkpoint"
            )


def _newest_valid(run_dir: Path, newest: int | None) -> Resumed | None:
    iterations = decide_on_main(lambda: _settled_iterations(run_dir) if newest is None else list_iterations(run_dir))
    iterations = [iteration for iteration in iterations if newest is None or iteration <= newest]
    damaged: dict[str, str] = {}
    for iteration in iterations:
        path = checkpoint_path(run_dir, iteration)
        try:
            manifest = read_manifest(path)
            faults = _verify_together(path, manifest)
        except CheckpointError as error:
            faults = [error.what]
        if not faults:
            return Resumed(manifest, damaged)
        damaged[path.name] = faults[0]
        logger.warning("checkpoint %s is not valid (%s); trying the previous one", path, faults[0])
    if iterations:
        raise CheckpointError(
            f"none of the {len(iterations)} checkpoints is valid",
            where=str(checkpoints_folder(run_dir)),
            fix="restore one, or set another run_dir to start over",
        )
    return None


def _settled_iterations(run_dir: Path) -> list[int]:
    clean_up(run_dir)
    return list_iterations(run_dir)


def _verify_together(path: Path, manifest: Manifest) -> list[str]:
    """Compare all files with the manifest; each file is read by one rank, and every rank returns all faults."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    names = sorted(manifest.files)[rank::world_size]
    mine = in_sight(lambda get_on: find_faults(path, names, manifest, get_on), beat)
    if rank == 0:
        mine += find_strangers(path, manifest) or _faults_of_index(path)
    gathered: list[list[str]] = [[] for _ in range(world_size)]
    torch.distributed.all_gather_object(gathered, mine)
    return [fault for faults in gathered for fault in faults]


def _faults_of_index(path: Path) -> list[str]:
    try:
        check_metadata(path)
    except CheckpointError as error:
        return [error.what]
    return []
