"""Write files and folders so that a reader, and a crash, see them whole or not at all; say why one failed."""

import errno
import os
import shutil
import socket
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from megatron_vlm.config import ConfigError, StorageError
from megatron_vlm.platform.files.locks import locked

UNFINISHED = ".tmp"
"""Last part of the name of a file or folder that is being written."""
SET_ASIDE = ".being_replaced"
"""Last part of the name of a folder that is being replaced; nobody gives this name to a folder of their own."""
_SECONDS_TO_WRITE = 3600.0
STORAGE_ERRNOS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR)
)
"""Errors of the disk, its quota or its permissions: the user can do something about them."""


def write_durably(path: Path, content: bytes, *, is_shared: bool = False) -> None:
    """Write beside the place of a file, flush to the disk and rename; see `open_durably`."""
    with open_durably(path, is_shared=is_shared) as stream:
        stream.write(content)


@contextmanager
def open_durably(path: Path, *, is_shared: bool = False) -> Iterator[BinaryIO]:
    """Give a file beside the place of another, whose place it takes when it is written without an error.

    Args:
        path: the place.
        is_shared: whether several processes, also of several nodes, may write the same place at once; the last one
            to finish stays. Each then writes under a name of its own, which a kill leaves behind.
    """
    unfinished = name_of_process(path) if is_shared else path.with_name(path.name + UNFINISHED)
    try:
        with unfinished.open("wb") as stream:
            yield stream
            flush_to_disk(stream)
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def flush_to_disk(stream: IO) -> None:
    """Return when everything written to an open file is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def name_of_process(path: Path) -> Path:
    """Return the unfinished name of `path` that only this process uses."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}{UNFINISHED}")


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left in `folder` under a name of their own.

    Those of this host are known to be gone; of others, nothing was written for an hour.
    """
    for path in folder.glob(f"*{UNFINISHED}"):
        name, _, process = path.name.removesuffix(UNFINISHED).rpartition(".")
        with suppress(FileNotFoundError):  # it was finished, or another process was faster
            is_silent = time.time() - path.stat().st_mtime > _SECONDS_TO_WRITE
            if is_silent or (name.endswith(f".{socket.gethostname()}") and not _is_running(process)):
                remove(path)


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True


@contextmanager
def folder_beside(folder: Path, *, is_new: bool = False, replaces: bool = False) -> Iterator[Path]:
    """Give an empty folder beside the place of another, which it takes when the block ends without an error.

    Args:
        folder: the place.
        is_new: nothing may be there, except an empty folder.
        replaces: whatever is there is replaced, as `replace_folder` does it.

    Raises:
        ConfigError: another process writes for the same place, or there is something where nothing may be.
        OSError: it cannot be written, or its place is not empty.
    """
    folder = folder.resolve()
    if folder.is_mount():
        raise ConfigError("output folder is a mount point", where=str(folder), fix="give a folder inside of it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside both of them: a lock inside would leave one of the two places before the other is taken.
    lock_file = folder.with_name(folder.name + ".lock")
    with locked(lock_file) as lock:
        if lock is None:
            raise ConfigError("another process writes this folder", where=str(folder), fix="wait for it, or stop it")
        try:
            if replaces:
                settle_folder(folder)
            if is_new and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ConfigError(
                    "output folder is not empty", where=str(folder), fix="give another --output, or delete it"
                )
            unfinished = folder.with_name(folder.name + UNFINISHED)
            yield from _filled(unfinished)
            if replaces:
                replace_folder(folder)
            else:
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


def replace_folder(folder: Path) -> None:
    """Put the finished `folder.tmp` in the place of `folder`, which may exist; only then remove the old one.

    A kill at any point leaves the old folder or the new one whole, and `settle_folder` puts it in its place.
    """
    unfinished, old = (folder.with_name(folder.name + ending) for ending in (UNFINISHED, SET_ASIDE))
    if folder.exists():
        os.replace(folder, old)
    os.replace(unfinished, folder)
    remove(old)


def settle_folder(folder: Path) -> None:
    """Finish what a killed `replace_folder` began; only the process that may write `folder` calls it.

    An old folder stands aside only once the new one is finished: without `folder`, its place is for `folder.tmp`.
    """
    unfinished, old = (folder.with_name(folder.name + ending) for ending in (UNFINISHED, SET_ASIDE))
    if not old.exists():
        return
    if not folder.exists():
        os.replace(unfinished if unfinished.exists() else old, folder)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def folder_once(folder: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `folder` when the block ends without an error.

    Several processes, also of several nodes, may build the same folder at once: the first to finish wins, and the
    others remove theirs, since all write the same.

    Raises:
        OSError: it cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = name_of_process(folder)
    yield from _filled(unfinished)
    try:
        os.rename(unfinished, folder)
    except OSError as error:
        shutil.rmtree(unfinished)
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


@contextmanager
def storage_errors(
    what: str, where: Path, *, kept: str = "", only: Container[int] | None = None, fix: str = ""
) -> Iterator[None]:
    """Turn errors of the file system into one that says what stopped.

    Args:
        what: what could not be done; begins the line.
        where: the file or folder to name where the error names none.
        kept: what is not lost.
        only: error numbers to turn, e.g. `STORAGE_ERRNOS`; None: all.
        fix: what to do; by default, to check the disk and run the same command again.

    Raises:
        StorageError: a file cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        if only is not None and error.errno not in only:
            raise
        fix = fix or "check the disk and its permissions, then run the same command again"
        raise StorageError(
            f"{what}: {error.strerror or error}",
            where=str(error.filename or where),
            fix=fix + (f"; {kept}" if kept else ""),
        ) from error
