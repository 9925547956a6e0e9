"""Where the checkpoints of a run are and which of them is the newest."""

import logging
import re
import shutil
from pathlib import Path

from megatron_vlm.checkpoint.manifest import MANIFEST_NAME, read_manifest
from megatron_vlm.config import CheckpointError
from megatron_vlm.platform.files.durable import write_durably

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
LATEST_NAME = "latest_checkpointed_iteration.txt"
_NAME = re.compile(r"iter_(\d{7,})")


def checkpoints_folder(run_dir: str | Path) -> Path:
    """Return the folder that holds the checkpoints of a run."""
    return Path(run_dir) / CHECKPOINTS


def checkpoint_path(run_dir: str | Path, iteration: int) -> Path:
    """Return the folder of one checkpoint."""
    return checkpoints_folder(run_dir) / f"iter_{iteration:07d}"


def list_iterations(run_dir: str | Path) -> list[int]:
    """Return the iterations that have a checkpoint folder, newest first; whole or not."""
    folder = checkpoints_folder(run_dir)
    names = (path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ()
    return sorted((int(match[1]) for match in map(_NAME.fullmatch, names) if match), reverse=True)


def write_latest(run_dir: str | Path, iteration: int) -> None:
    """Record the newest iteration for people and other tools; nothing here depends on it."""
    write_durably(checkpoints_folder(run_dir) / LATEST_NAME, f"{iteration}\n".encode())


def prune(run_dir: str | Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints; 0 keeps all."""
    if not keep_last:
        return
    for iteration in list_iterations(run_dir)[keep_last:]:
        path = checkpoint_path(run_dir, iteration)
        # The manifest goes first: a removal that is cut short leaves no checkpoint that looks whole.
        (path / MANIFEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(path)


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that `path` means: itself, or the newest complete one of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST_NAME).is_file():
        return path
    for iteration in list_iterations(path):
        candidate = checkpoint_path(path, iteration)
        try:
            read_manifest(candidate)
        except CheckpointError as error:
            logger.warning("passing over an incomplete checkpoint: %s", error)
            continue
        return candidate
    raise CheckpointError(
        "no complete checkpoint found", where=str(path), fix="name a run folder or one of its checkpoints"
    )
