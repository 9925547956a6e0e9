"""The manifest of a checkpoint: size and checksum of every file, written last; a folder without one is incomplete."""

import json
import re
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.config import CheckpointError
from megatron_vlm.data.shards.manifest import FORMAT_NAME
from megatron_vlm.platform.files.durable import write_durably
from megatron_vlm.platform.files.uncached import read_blocks

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2
"""Version 1 has no checksum of the manifest itself; it is read all the same."""
_OWN_CHECKSUM = "crc32"
_FOLDER_NAME = re.compile(r"iter_(\d{7,})(\..*)?")
_NOT_OURS = ".nfs"
"""NFS shows a removed file under such a name while a process has it open."""
_NUM_READERS = 2
"""Files read at a time: a checksum takes longer than reading from a cache or a fast disk."""
_BLOCK_BYTES = 1 << 18
"""Read into the same memory again and again, which stays in the processor's cache: twice as fast as blocks of 4 MiB."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size [bytes] and crc32 of one file."""

    size: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The checkpoint that holds the weights which a run with an adapter does not train, and so does not save."""

    path: str
    """Its folder when the run started, absolute."""
    relative_path: str
    """The same, relative to a checkpoint of the run, for runs that were moved together."""
    sha256: str
    """Of its manifest, which has the checksum of every file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The files of a checkpoint and the progress of the run."""

    iteration: int
    progress: dict[str, Any]
    """`TrainState` as plain values; empty if the checkpoint holds only weights."""
    files: dict[str, FileRecord]
    base: Base | None = None
    """Where the weights are that this checkpoint lacks; None: it holds all."""


def checksum_file(path: Path, get_on: Callable[[], object] = lambda: None, *, is_cached: bool = True) -> FileRecord:
    """Read a file once and return its record.

    Args:
        path: the file.
        get_on: called after each block.
        is_cached: whether the system may take bytes from its cache and keep them there; False: they come from the disk.
    """
    crc = size = 0
    for block in _cached_blocks(path) if is_cached else read_blocks(path):
        crc = zlib.crc32(block, crc)
        size += len(block)
        get_on()
    return FileRecord(size, crc)


def _cached_blocks(path: Path) -> Iterator[memoryview]:
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as stream:
        while length := stream.readinto(block):
            yield block[:length]


def list_files(folder: Path) -> list[str]:
    """Return the relative names of all files that a manifest records, sorted."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST_NAME and not Path(name).name.startswith(_NOT_OURS))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically: it is either complete or missing."""
    record = {
        "format_version": FORMAT_VERSION,
        "iteration": manifest.iteration,
        "progress": manifest.progress,
        "files": {name: asdict(entry) for name, entry in manifest.files.items()},
        "base": manifest.base and asdict(manifest.base),
    }
    record[_OWN_CHECKSUM] = _checksum_of(record)
    write_durably(folder / MANIFEST_NAME, json.dumps(record, indent=1).encode())


def _checksum_of(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, a dataset's, has another format version, or belongs to another
            iteration than its folder or its progress.
    """
    path = folder / MANIFEST_NAME
    try:
        record = json.loads(path.read_bytes())
        if record.get("format") == FORMAT_NAME:
            fix = "name a run folder or one of its checkpoints"
            raise CheckpointError("folder is a dataset, not a checkpoint", where=str(folder), fix=fix)
        version, own = record["format_version"], record.pop(_OWN_CHECKSUM, None)
        files = {name: FileRecord(entry["size"], entry["crc32"]) for name, entry in record["files"].items()}
        base = Base(**record["base"]) if record.get("base") else None
        manifest = Manifest(iteration=record["iteration"], progress=dict(record["progress"]), files=files, base=base)
    except FileNotFoundError:
        raise CheckpointError(
            "checkpoint has no manifest.json", where=str(folder), fix="use a complete checkpoint"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IsADirectoryError) as error:
        raise CheckpointError(
            f"manifest.json is damaged: {error}", where=str(path), fix="use another checkpoint"
        ) from None
    if version not in (1, FORMAT_VERSION):
        raise CheckpointError(
            f"manifest.json has format version {version}, this program reads 1 and {FORMAT_VERSION}",
            where=str(path),
            fix="use the program that wrote it",
        )
    if version == FORMAT_VERSION and own != _checksum_of(record):
        raise CheckpointError(
            "manifest.json is damaged: it has the wrong checksum", where=str(path), fix="use another checkpoint"
        )
    _check_iterations(manifest, folder)
    return manifest


def _check_iterations(manifest: Manifest, folder: Path) -> None:
    """Compare what folder, manifest and progress say; one of them alone must not move the run."""
    name = _FOLDER_NAME.fullmatch(folder.resolve().name)
    said = {
        MANIFEST_NAME: manifest.iteration,
        "progress": manifest.progress.get("iteration", manifest.iteration),
        "folder": int(name[1]) if name else manifest.iteration,
    }
    if len(set(said.values())) > 1:
        found = ", ".join(f"{where} {iteration}" for where, iteration in said.items())
        raise CheckpointError(f"iterations differ: {found}", where=str(folder), fix="use another checkpoint")


def has_all_files(folder: Path) -> bool:
    """Return whether the manifest is readable and every file has the size that it records; no file is read."""
    try:
        manifest = read_manifest(folder)
        return all((folder / name).stat().st_size == record.size for name, record in manifest.files.items())
    except (CheckpointError, FileNotFoundError):
        return False


def find_faults(
    folder: Path,
    names: list[str],
    manifest: Manifest,
    get_on: Callable[[], object] = lambda: None,
    *,
    is_cached: bool = True,
) -> list[str]:
    """Return one line for each of the named files that differs from the manifest.

    Args:
        folder: of the checkpoint.
        names: of files that the manifest has.
        manifest: of the checkpoint.
        get_on: called from several threads, after each block that was read.
        is_cached: as in `checksum_file`.
    """

    def find(name: str) -> str:
        return _find_fault(
            folder / name, name, manifest.files[name], lambda path: checksum_file(path, get_on, is_cached=is_cached)
        )

    with ThreadPoolExecutor(_NUM_READERS) as readers:
        return [fault for fault in readers.map(find, names) if fault]


def _find_fault(path: Path, name: str, expected: FileRecord, checksum: Callable[[Path], FileRecord]) -> str:
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != expected.size:
        return f"{name} has {path.stat().st_size} bytes, not {expected.size}"
    return "" if checksum(path) == expected else f"{name} has the wrong checksum"


def find_strangers(folder: Path, manifest: Manifest) -> list[str]:
    """Return one line for each file of the folder that the manifest does not have, so that nothing vouches for it."""
    return [f"{name} is not in the manifest" for name in list_files(folder) if name not in manifest.files]
