"""Where the checkpoints of a run are, which is the newest, and which are kept."""

import logging
import os
import re
import shutil
from pathlib import Path

from megatron_vlm.checkpoint.manifest import MANIFEST_NAME, has_all_files, read_manifest
from megatron_vlm.config import CheckpointError
from megatron_vlm.platform.files.durable import SET_ASIDE, UNFINISHED, remove, settle_folder, write_durably
from megatron_vlm.platform.files.run_folder import CHECKPOINTS_FOLDER

logger = logging.getLogger(__name__)

LATEST_NAME = "latest_checkpointed_iteration.txt"
_NAME = re.compile(r"iter_(\d{7,})")


def checkpoints_folder(run_dir: str | Path) -> Path:
    """Return the folder that holds the checkpoints of a run."""
    return Path(run_dir) / CHECKPOINTS_FOLDER


def checkpoint_path(run_dir: str | Path, iteration: int) -> Path:
    """Return the folder of one checkpoint."""
    return checkpoints_folder(run_dir) / f"iter_{iteration:07d}"


def list_iterations(run_dir: str | Path) -> list[int]:
    """Return the iterations that have a checkpoint folder, newest first, valid or not."""
    folder = checkpoints_folder(run_dir)
    names = (path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ()
    return sorted((int(match[1]) for match in map(_NAME.fullmatch, names) if match), reverse=True)


def write_latest(run_dir: str | Path, iteration: int) -> None:
    """Record the newest iteration for people and other tools; nothing here depends on it."""
    write_durably(checkpoints_folder(run_dir) / LATEST_NAME, f"{iteration}\n".encode())


def prune(run_dir: str | Path, keep_last: int, saved: int) -> None:
    """Remove every checkpoint older than the newest `keep_last` valid ones up to iteration `saved`; 0 keeps all.

    A checkpoint counts as valid if its manifest is readable and its files have the recorded sizes: a few calls per
    file, only for the newest checkpoints. Checksums are left to the start of a run, which reads every byte. Damaged
    checkpoints count for nothing, nor do those newer than the one just saved: the run would have resumed from them if
    their checksums were right. So the last valid one always stays.
    """
    if not keep_last:
        return
    num_valid = 0
    for iteration in list_iterations(run_dir):
        path = checkpoint_path(run_dir, iteration)
        if num_valid < keep_last:
            num_valid += iteration <= saved and has_all_files(path)
            continue
        # The manifest goes first: a removal that is cut short leaves no checkpoint that looks whole.
        (path / MANIFEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(path)


def clean_up(run_dir: str | Path) -> None:
    """Finish or remove what a killed save left; only the job that holds the run folder may call it.

    A checkpoint that was complete but not renamed yet takes its place, unless one of its iteration is there.
    """
    folder = checkpoints_folder(run_dir)
    for aside in folder.glob(f"iter_*{SET_ASIDE}"):
        settle_folder(aside.with_name(aside.name.removesuffix(SET_ASIDE)))
    for unfinished in folder.glob(f"iter_*{UNFINISHED}"):
        final = unfinished.with_name(unfinished.name.removesuffix(UNFINISHED))
        if has_all_files(unfinished) and not final.exists():
            os.replace(unfinished, final)
        else:
            remove(unfinished)


def find_checkpoint(path: str | Path) -> Path:
    """Return `path` if it is a checkpoint, or the newest complete checkpoint of the run folder `path`.

    Raises:
        CheckpointError: there is no complete checkpoint, or the manifest of `path` is no checkpoint's or damaged.
    """
    path = Path(path)
    if (path / MANIFEST_NAME).is_file():
        read_manifest(path)
        return path
    for iteration in list_iterations(path):
        candidate = checkpoint_path(path, iteration)
        try:
            read_manifest(candidate)
        except CheckpointError as error:
            logger.warning("skipping an incomplete checkpoint: %s", error)
            continue
        return candidate
    raise CheckpointError(
        "no complete checkpoint found", where=str(path), fix="name a run folder or one of its checkpoints"
    )
