"""Write files so that a reader, and a crash, see them whole or not at all; say why one could not be written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from megatron_vlm.config import ConfigError, StorageError
from megatron_vlm.platform.files.locks import locked


def write_durably(path: Path, content: bytes) -> None:
    """Write beside the place of a file, flush to the disk and rename."""
    with open_durably(path) as stream:
        stream.write(content)


@contextmanager
def open_durably(path: Path) -> Iterator[BinaryIO]:
    """Give a file beside the place of another, whose place it takes when it is written without an error."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as stream:
        yield stream
        flush_to_disk(stream)
    os.replace(unfinished, path)


def flush_to_disk(stream: IO) -> None:
    """Return when all that was written to an open file is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


@contextmanager
def folder_beside(folder: Path, *, is_new: bool = False) -> Iterator[Path]:
    """Give an empty folder beside the place of another, which it takes when the block ends without an error.

    Args:
        folder: the place.
        is_new: whether nothing may be there.

    Raises:
        ConfigError: another process writes for the same place, or there is something where nothing may be.
        OSError: it cannot be written, or its place is not empty.
    """
    folder = folder.resolve()
    if folder.is_mount():
        raise ConfigError("output folder is a mount point", where=str(folder), fix="give a folder inside of it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(folder.name + ".tmp")
    # Beside both of them: a lock inside would leave one of the two places before the other is taken.
    lock_file = folder.with_name(folder.name + ".lock")
    with locked(lock_file) as lock:
        if lock is None:
            raise ConfigError("another process writes this folder", where=str(folder), fix="wait for it, or stop it")
        try:
            if is_new and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ConfigError(
                    "output folder is not empty", where=str(folder), fix="give another --output, or delete it"
                )
            yield from _filled(unfinished)
            os.replace(unfinished, folder)
        finally:
            lock_file.unlink()


def _filled(folder: Path) -> Iterator[Path]:
    """Give a folder without what a kill has left in it; where the block ends with an error, it is removed."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def storage_errors(what: str, where: Path, *, kept: str = "") -> Iterator[None]:
    """Turn errors of the file system into one that says what stopped.

    Args:
        what: what could not be done; begins the line.
        where: the file or folder to name where the error names none.
        kept: what is not lost.

    Raises:
        StorageError: a file cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{what}: {error.strerror or error}",
            where=str(error.filename or where),
            fix="check the disk and its permissions, then run the same command again" + (f"; {kept}" if kept else ""),
        ) from error
