"""Write files so that a reader, and a crash, see them whole or not at all; say why one could not be written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from megatron_vlm.config import ConfigError, StorageError
from megatron_vlm.platform.locks import locked

_LOCK_NAME = ".lock"


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

    A block that removes it leaves that place as it is.

    Args:
        folder: the place.
        is_new: whether nothing may be there.

    Raises:
        ConfigError: another process writes for the same place, or there is something where nothing may be.
        OSError: it cannot be written, or its place is not empty.
    """
    unfinished = folder.with_name(folder.name + ".tmp")
    unfinished.mkdir(parents=True, exist_ok=True)
    lock_file = unfinished / _LOCK_NAME
    with locked(lock_file) as lock:
        if lock is None:
            raise ConfigError("another process writes this folder", where=str(folder), fix="wait for it, or stop it")
        try:
            if is_new and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ConfigError(
                    "output folder is not empty", where=str(folder), fix="give another --output, or delete it"
                )
            for left_over in [entry for entry in unfinished.iterdir() if entry != lock_file]:
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
            yield unfinished
            if unfinished.exists():
                lock_file.unlink()
                os.replace(unfinished, folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
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
