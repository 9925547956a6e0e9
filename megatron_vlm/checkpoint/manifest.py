"""The manifest of a checkpoint: size and checksum of every file, written last; a folder without one is incomplete."""

import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.config import CheckpointError
from megatron_vlm.platform.files.durable import write_durably

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size [bytes] and crc32 of one file."""

    size: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The files of a checkpoint and the progress of the run."""

    iteration: int
    progress: dict[str, Any]
    """`TrainState` as plain values; empty if the checkpoint holds only weights."""
    files: dict[str, FileRecord]


def checksum_file(path: Path) -> FileRecord:
    """Read a file once and return its record."""
    crc = size = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return FileRecord(size, crc)


def list_files(folder: Path) -> list[str]:
    """Return the relative names of all files that a manifest records, sorted."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST_NAME)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically: it is either complete or missing."""
    record = {
        "format_version": FORMAT_VERSION,
        "iteration": manifest.iteration,
        "progress": manifest.progress,
        "files": {name: asdict(entry) for name, entry in manifest.files.items()},
    }
    write_durably(folder / MANIFEST_NAME, json.dumps(record, indent=1).encode())


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or has another format version.
    """
    path = folder / MANIFEST_NAME
    try:
        record = json.loads(path.read_text())
        version = record["format_version"]
        files = {name: FileRecord(entry["size"], entry["crc32"]) for name, entry in record["files"].items()}
        manifest = Manifest(iteration=record["iteration"], progress=record["progress"], files=files)
    except FileNotFoundError:
        raise CheckpointError(
            "checkpoint has no manifest", where=str(folder), fix="use a complete checkpoint"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"manifest is damaged: {error}", where=str(path), fix="use another checkpoint") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"manifest has format version {version}, this program reads {FORMAT_VERSION}",
            where=str(path),
            fix="use the program that wrote it",
        )
    return manifest


def has_all_files(folder: Path) -> bool:
    """Return whether the manifest is readable and every file has the size that it records; no file is read."""
    try:
        manifest = read_manifest(folder)
        return all((folder / name).stat().st_size == record.size for name, record in manifest.files.items())
    except (CheckpointError, FileNotFoundError):
        return False


def find_faults(folder: Path, names: list[str], manifest: Manifest) -> list[str]:
    """Return one line for each of the named files that differs from the manifest."""
    faults = []
    for name in names:
        path, expected = folder / name, manifest.files[name]
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != expected.size:
            faults.append(f"{name} has {path.stat().st_size} bytes, not {expected.size}")
        elif checksum_file(path) != expected:
            faults.append(f"{name} has the wrong checksum")
    return faults
