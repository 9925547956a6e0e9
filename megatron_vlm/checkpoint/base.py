"""Checkpoints that hold only what learns, and the base that holds the rest.

A run with an adapter leaves most weights as they are. Its checkpoints do not repeat them: they name the checkpoint that
the run started from, their base, and the checksum of its manifest. A base may itself have a base, if a run with an
adapter goes on from another one.
"""

import hashlib
import os
from pathlib import Path

from megatron_vlm.checkpoint.folder import checkpoint_path
from megatron_vlm.checkpoint.manifest import MANIFEST_NAME, Base, read_manifest
from megatron_vlm.config import CheckpointError


def record_base(checkpoint: Path, run_dir: str | Path) -> Base:
    """Return what the checkpoints of a run record about the checkpoint that it starts from."""
    found, run = checkpoint.resolve(), checkpoint_path(run_dir, 0).resolve()
    return Base(path=str(found), relative_path=os.path.relpath(found, run), sha256=_hash_manifest(found))


def find_base(checkpoint: Path, base: Base) -> Path:
    """Return the folder of a checkpoint's base: where it was, or where it lies if both runs were moved together.

    Raises:
        CheckpointError: it is not there, or another checkpoint is in its place.
    """
    places = [Path(base.path), Path(os.path.normpath(checkpoint.resolve() / base.relative_path))]
    found = [place for place in places if (place / MANIFEST_NAME).is_file()]
    for place in found:
        if _hash_manifest(place) == base.sha256:
            return place
    if found:
        raise CheckpointError(
            f"base {found[0]} is not the checkpoint that this one was trained from",
            where=str(checkpoint),
            fix="put the original back: the weights that did not learn are only there",
        )
    raise CheckpointError(
        f"base {base.path} is missing",
        where=str(checkpoint),
        fix="put it back or link it there: the weights that did not learn are only there",
    )


def with_bases(checkpoint: Path) -> list[Path]:
    """Return a checkpoint, its base, the base of that one, and so on to the one that holds all the rest.

    Raises:
        CheckpointError: a manifest is missing or damaged, or a base is missing or another one.
    """
    found = [checkpoint]
    while (base := read_manifest(found[-1]).base) is not None:
        found.append(find_base(found[-1], base))
    return found


def _hash_manifest(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / MANIFEST_NAME).read_bytes()).hexdigest()
