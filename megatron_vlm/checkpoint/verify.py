"""Inspect the checkpoints of a run without loading them."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.checkpoint.base import find_base, with_bases
from megatron_vlm.checkpoint.folder import checkpoint_path, list_iterations
from megatron_vlm.checkpoint.manifest import MANIFEST_NAME, find_faults, find_strangers, read_manifest
from megatron_vlm.checkpoint.pickles import check_metadata
from megatron_vlm.config import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFacts:
    """What is known about one checkpoint folder."""

    path: Path
    iteration: int
    num_files: int
    size: int
    """Total size of the files [bytes]."""
    faults: tuple[str, ...]
    """One line per fault; empty for a valid checkpoint."""

    @property
    def is_valid(self) -> bool:
        """Whether a run can start from it."""
        return not self.faults


def checkpoint_folders(path: Path) -> list[Path]:
    """Return `path` if it is a checkpoint, or all checkpoints of the run folder `path`, newest first.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    if (path / MANIFEST_NAME).is_file():
        return [path]
    folders = [checkpoint_path(path, iteration) for iteration in list_iterations(path)]
    if not folders:
        raise CheckpointError("no checkpoint found", where=str(path), fix="name a run folder or a checkpoint")
    return folders


def bases_of(checkpoints: Iterable[Path]) -> list[Path]:
    """Return the bases that these checkpoints need, as far as they are there."""
    bases: dict[Path, None] = {}
    for checkpoint in checkpoints:
        with suppress(CheckpointError):  # a fault that `inspect_checkpoint` reports
            bases |= dict.fromkeys(with_bases(checkpoint)[1:])
    return list(bases)


def inspect_checkpoint(path: Path, *, read_files: bool) -> CheckpointFacts:
    """Return what is known about one checkpoint; of its base, whether it is there.

    Args:
        path: its folder.
        read_files: compare every byte with the manifest; otherwise, read only the manifest.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return CheckpointFacts(path=path, iteration=_iteration_of(path), num_files=0, size=0, faults=(error.what,))
    faults = find_faults(path, sorted(manifest.files), manifest, is_cached=False) if read_files else []
    if read_files:
        faults += find_strangers(path, manifest)
    if read_files and not faults:
        try:
            check_metadata(path)
        except CheckpointError as error:
            faults = [error.what]
    if manifest.base is not None:
        try:
            find_base(path, manifest.base)
        except CheckpointError as error:
            faults.append(error.what)
    return CheckpointFacts(
        path=path,
        iteration=manifest.iteration,
        num_files=len(manifest.files),
        size=sum(record.size for record in manifest.files.values()),
        faults=tuple(faults),
    )


def check_whole(path: Path) -> None:
    """Compare every byte of a checkpoint, and of its base if it has one, with their manifests.

    Raises:
        CheckpointError: a file differs; the base is missing or another one.
    """
    for folder in with_bases(path):
        faults = inspect_checkpoint(folder, read_files=True).faults
        if faults:
            raise CheckpointError(
                f"checkpoint is damaged: {faults[0]}",
                where=str(folder),
                fix="use another checkpoint, or copy this one again",
            )


def _iteration_of(path: Path) -> int:
    digits = path.name.removeprefix("iter_")
    return int(digits) if digits.isdigit() else -1
