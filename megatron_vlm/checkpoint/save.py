"""Save a checkpoint of a running job: written next to its final place, manifest last, then renamed.

A save has two halves. `prepare_save` deals out what each rank writes. `write_save` writes it, and may do so in another
thread with process groups of its own while the run goes on, if the values were copied: `checkpoint/background.py`.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

from megatron_vlm.checkpoint.finite import check_finite
from megatron_vlm.checkpoint.folder import checkpoint_path, prune, write_latest
from megatron_vlm.checkpoint.manifest import Base, Manifest, checksum_file, list_files, write_manifest
from megatron_vlm.checkpoint.optimizer_state import STEP
from megatron_vlm.checkpoint.parallel_files import RankPart, WrittenPart, plan_part
from megatron_vlm.checkpoint.sharded_state import OPTIMIZER_KEY, SHARDING_METADATA, describe
from megatron_vlm.config import StorageError, TrainConfig, UserError, save_config
from megatron_vlm.parallel.collective import in_sight, together
from megatron_vlm.platform.files.durable import UNFINISHED, remove, replace_folder, settle_folder
from megatron_vlm.platform.files.run_folder import CONFIG_NAME
from megatron_vlm.platform.launch.heartbeat import beat

logger = logging.getLogger(__name__)
T = TypeVar("T")
_FIX = "make room or name another run_dir"
_SMALL_FILES = 1 << 20
"""Room for what does not grow with the tensors: settings, manifest, progress [bytes]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSave:
    """A save that no longer needs the model; its tensors may still be the run's own."""

    config: TrainConfig
    progress: dict[str, Any]
    base: Base | None
    part: RankPart

    @property
    def final(self) -> Path:
        """The folder of the finished checkpoint."""
        return checkpoint_path(self.config.run_dir, self.progress["iteration"])

    @property
    def temporary(self) -> Path:
        """The folder while it is written."""
        return self.final.with_name(self.final.name + UNFINISHED)


def save_checkpoint(
    config: TrainConfig,
    chunks: Sequence[MegatronModule],
    optimizer: MegatronOptimizer,
    progress: dict[str, Any],
    base: Base | None = None,
) -> Path:
    """Save model, optimizer and progress; all ranks call it together.

    A checkpoint of the same iteration, left by an attempt that was lost, is replaced. A kill at any point leaves the
    old or the new one intact; `clean_up` restores order when the run starts again.

    Args:
        config: of the run; its folder, retention and type of optimizer are used.
        chunks: the model of this rank, without wrappers.
        optimizer: its optimizer.
        progress: plain values, with at least `iteration`.
        base: the checkpoint that holds the weights which do not learn, so that this one leaves them out; None: this
            one holds all weights.

    Returns:
        The folder of the checkpoint, complete when the call returns.

    Raises:
        StorageError: a rank could not write, or the disk has no room; every rank raises it. Earlier checkpoints are
            unchanged.
        NumericError: weights or moments are not finite; every rank raises it. Nothing is written or removed.
    """
    return write_save(prepare_save(config, chunks, optimizer, progress, base))


def prepare_save(
    config: TrainConfig,
    chunks: Sequence[MegatronModule],
    optimizer: MegatronOptimizer,
    progress: dict[str, Any],
    base: Base | None = None,
    stage: Callable[[list[ShardedTensor]], object] = lambda tensors: None,
) -> PreparedSave:
    """Deal out what each rank writes; all ranks call it together.

    Args:
        config: as in `save_checkpoint`.
        chunks: likewise.
        optimizer: likewise.
        progress: likewise.
        base: likewise.
        stage: as in `plan_part`.
    """
    state = describe(chunks, optimizer, only_learning=base is not None)
    # The first rank writes it for all, and its stage may train nothing.
    state[OPTIMIZER_KEY][STEP] = _largest(state[OPTIMIZER_KEY][STEP])
    part = plan_part(state, dict(SHARDING_METADATA), stage)
    return PreparedSave(config=config, progress=progress, base=base, part=part)


def write_save(
    save: PreparedSave,
    group: torch.distributed.ProcessGroup | None = None,
    show_life: Callable[[], object] = beat,
) -> Path:
    """Write a prepared save; all ranks call it together.

    Args:
        save: what this rank writes.
        group: of all ranks, over which they talk; None: the default group.
        show_life: called every few seconds while this rank, or one that it waits for, writes. A rank's own sign of
            life is that of its main thread, and no other thread may give it.

    Returns:
        The folder of the checkpoint, complete when the call returns.

    Raises:
        StorageError: as for `save_checkpoint`.
        NumericError: as for `save_checkpoint`.
    """
    is_main = torch.distributed.get_rank() == 0
    try:
        together(
            lambda: _as_storage(save, lambda: _look_at(save)),
            lambda sizes: _as_storage(save, lambda: _begin(save, sum(sizes))),
            group,
        )
        together(
            lambda: in_sight(lambda get_on: _as_storage(save, lambda: _write(save, get_on)), show_life, group),
            lambda parts: _as_storage(save, lambda: _complete(save, parts)),
            group,
        )
    except StorageError:
        if is_main:
            with suppress(OSError):
                remove(save.temporary)  # other checkpoints may need the room
        raise
    if is_main:
        _prune(save)
    return save.final


def _as_storage(save: PreparedSave, work: Callable[[], T]) -> T:
    """Turn whatever keeps a rank from writing into a StorageError, which all ranks will raise: no save ends the run."""
    try:
        return work()
    except UserError:
        raise
    except OSError as error:
        where = str(error.filename or save.temporary)
        raise StorageError(f"checkpoint not saved: {error.strerror or error}", where=where, fix=_FIX) from error
    except Exception as error:
        logger.exception("checkpoint not saved")
        reason = next(iter(str(error).splitlines()), "")[:120]
        where = f"{save.temporary}, rank {torch.distributed.get_rank()}"
        raise StorageError(f"checkpoint not saved: {type(error).__name__}: {reason}", where=where, fix=_FIX) from error


def _look_at(save: PreparedSave) -> int:
    """Return the bytes that this rank writes, if all values are finite."""
    check_finite(save.part.tensors, save.progress["iteration"])
    return save.part.num_bytes


def _begin(save: PreparedSave, num_bytes: int) -> None:
    settle_folder(save.final)
    remove(save.temporary)
    save.temporary.mkdir(parents=True)
    disk, needed = shutil.disk_usage(save.temporary), num_bytes + _SMALL_FILES
    # Some network file systems do not say what they have.
    if disk.total and disk.free < needed:
        raise StorageError(
            f"checkpoint not saved: it needs {needed / 1e9:.3f} GB, the disk has {disk.free / 1e9:.3f} GB free",
            where=str(save.temporary),
            fix=_FIX,
        )


def _write(save: PreparedSave, get_on: Callable[[], None]) -> WrittenPart:
    # On a network file system, another host may not see the new folder yet.
    save.temporary.mkdir(parents=True, exist_ok=True)
    return save.part.write(save.temporary, get_on)


def _complete(save: PreparedSave, parts: Sequence[WrittenPart]) -> None:
    """Add index and settings, the manifest last, and put the checkpoint in its place."""
    folder, iteration = save.temporary, save.progress["iteration"]
    save.part.complete(folder, parts)
    save_config(save.config, folder / CONFIG_NAME)
    files = {name: record for part in parts for name, record in part.files.items()}
    files |= {name: checksum_file(folder / name) for name in list_files(folder) if name not in files}
    files = dict(sorted(files.items()))
    write_manifest(folder, Manifest(iteration=iteration, progress=save.progress, files=files, base=save.base))
    replace_folder(save.final)
    write_latest(save.config.run_dir, iteration)


def _prune(save: PreparedSave) -> None:
    """Remove old checkpoints; the new one is safe whatever happens here."""
    try:
        prune(save.config.run_dir, save.config.checkpoint.keep_last, save.progress["iteration"])
    except OSError as error:
        logger.warning("an old checkpoint was not removed: %s (%s)", error.strerror or error, error.filename)


def _largest(number: int) -> int:
    """Return the largest of all ranks' numbers."""
    largest = torch.tensor(number, dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)
