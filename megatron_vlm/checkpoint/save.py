"""Save a checkpoint of a running job: written next to its final place, manifest last, then renamed."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vlm.checkpoint.finite import check_finite
from megatron_vlm.checkpoint.folder import checkpoint_path, prune, write_latest
from megatron_vlm.checkpoint.manifest import Base, FileRecord, Manifest, checksum_file, list_files, write_manifest
from megatron_vlm.checkpoint.optimizer_state import STEP
from megatron_vlm.checkpoint.parallel_files import write_state
from megatron_vlm.checkpoint.sharded_state import OPTIMIZER_KEY, SHARDING_METADATA, describe
from megatron_vlm.config import StorageError, TrainConfig, save_config
from megatron_vlm.platform.files.durable import (
    STORAGE_ERRNOS,
    UNFINISHED,
    replace_folder,
    settle_folder,
    storage_errors,
)
from megatron_vlm.platform.files.run_folder import CONFIG_NAME


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
        StorageError: the disk is full or read-only; earlier checkpoints are unchanged.
        NumericError: weights or moments are not finite; nothing is written or removed.
    """
    check_finite(chunks, optimizer, progress["iteration"])
    final = checkpoint_path(config.run_dir, progress["iteration"])
    temporary = final.with_name(final.name + UNFINISHED)
    is_main = torch.distributed.get_rank() == 0
    fix = "make room or name another run_dir"
    with storage_errors("checkpoint not saved", temporary, only=STORAGE_ERRNOS, fix=fix):
        if is_main:
            settle_folder(final)
        try:
            _write(describe(chunks, optimizer, only_learning=base is not None), temporary)
            _complete(config, progress, base, temporary)
        except CheckpointException as error:  # a BaseException
            raise _error_of_ranks(error, temporary, fix) from error
        if is_main:
            replace_folder(final)
            write_latest(config.run_dir, progress["iteration"])
            prune(config.run_dir, config.checkpoint.keep_last, progress["iteration"])
    torch.distributed.barrier()
    return final


def _error_of_ranks(error: CheckpointException, folder: Path, fix: str) -> Exception:
    """Return the error of the storage that kept a rank from writing, or else an error of ours."""
    causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        # torch's writer of a tensor turns the disk's error into a RuntimeError of its own.
        if not isinstance(cause, (OSError, RuntimeError)):
            return RuntimeError(f"checkpoint not saved: {cause!r}")
    known = [cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror]
    what = known[0] if known else "a file was not written"
    return StorageError(f"checkpoint not saved: {what}", where=str(folder), fix=fix)


def _write(state: dict[str, Any], folder: Path) -> None:
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    # The first rank writes it for all, and its stage may train nothing.
    state[OPTIMIZER_KEY][STEP] = _largest(state[OPTIMIZER_KEY][STEP])
    write_state(state, folder, dict(SHARDING_METADATA))


def _complete(config: TrainConfig, progress: dict[str, Any], base: Base | None, folder: Path) -> None:
    """Add the settings, and the manifest last."""
    is_main = torch.distributed.get_rank() == 0
    if is_main:
        save_config(config, folder / CONFIG_NAME)
    torch.distributed.barrier()
    files = _checksum_together(folder)
    if is_main:
        write_manifest(folder, Manifest(iteration=progress["iteration"], progress=progress, files=files, base=base))


def _largest(number: int) -> int:
    """Return the largest of all ranks' numbers."""
    largest = torch.tensor(number, dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


def _checksum_together(folder: Path) -> dict[str, FileRecord]:
    """Checksum all files; each is read by one rank."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = {name: checksum_file(folder / name) for name in list_files(folder)[rank::world_size]}
    gathered: list[dict[str, FileRecord]] = [{} for _ in range(world_size)]
    torch.distributed.all_gather_object(gathered, mine)
    return {name: record for records in gathered for name, record in sorted(records.items())}
