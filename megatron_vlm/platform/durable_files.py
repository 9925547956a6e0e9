"""Write files so that a reader, and a crash, see them whole or not at all; say why one could not be written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from megatron_vlm.config import StorageError


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
