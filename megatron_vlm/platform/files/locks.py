"""File locks: one process at a time in a folder."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO | None]:
    """Open and lock a file, creating it if it is missing; the kernel releases the lock however this process ends.

    On a file system without locks, it warns and goes on.

    Yields:
        The file, for reading and appending; None if another process holds it, or has just removed it.

    Raises:
        OSError: the file cannot be opened, or the file system failed.
    """
    with path.open("a+b") as file:
        yield file if _lock(file) and _is_at(file, path) else None


@contextmanager
def locked_for_reading(path: Path) -> Iterator[bool]:
    """Keep those who lock a file with `locked` away; several readers may do so at once. Nothing is written.

    Yields:
        Whether nobody holds it; also if there is no file.

    Raises:
        OSError: as for `locked`.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        yield True
        return
    with file:
        yield _lock(file, fcntl.LOCK_SH)


def _lock(file: BinaryIO, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning("%s: this file system has no locks; do not run two commands on this folder at once", file.name)
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
