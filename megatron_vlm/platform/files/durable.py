"""Write files and folders atomically: readers and crashes see them complete or not at all; report why one failed."""

import errno
import os
import shutil
import socket
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from megatron_vlm.config import ConfigError, StorageError
from megatron_vlm.platform.files.locks import locked

UNFINISHED = ".megatron_vlm-unfinished"
"""Suffix of a file or folder that is being written; like the next two, a name that nobody else gives to anything."""
SET_ASIDE = ".megatron_vlm-replaced"
"""Suffix of a folder that is being replaced."""
LOCK = ".megatron_vlm-lock"
"""Suffix of the lock file of a folder that is being written."""
_SECONDS_TO_WRITE = 3600.0
WRONG_KIND_ERRNOS = frozenset((errno.ENOTDIR, errno.EISDIR))
"""A file stands where a folder belongs, or the other way round."""
STORAGE_ERRNOS = WRONG_KIND_ERRNOS | {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EFBIG,
}
"""Errors of the disk, its quota, its permissions or what stands on it, which the user can fix."""


class Flushable(Protocol):
    """An open file."""

    def flush(self) -> None:
        """Pass on to the system what was written."""

    def fileno(self) -> int:
        """Return the descriptor."""


def write_durably(path: Path, content: bytes, *, is_shared: bool = False) -> None:
    """Write a temporary file, flush it to the disk and rename it to `path`; see `open_durably`."""
    with open_durably(path, is_shared=is_shared) as stream:
        stream.write(content)


@contextmanager
def open_durably(path: Path, *, is_shared: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file that is renamed to `path` when the block ends without an error.

    Args:
        path: the file to write.
        is_shared: whether several processes, possibly on several nodes, may write `path` at the same time; the last
            one to finish wins. Each uses its own temporary name, and a killed process leaves its file behind.
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


def flush_to_disk(stream: Flushable) -> None:
    """Wait until everything written to an open file is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def name_of_process(path: Path) -> Path:
    """Return a temporary name for `path` that only this process uses."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}{UNFINISHED}")


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left in `folder` under their temporary names.

    On this host, processes that no longer exist; on other hosts, those that have written nothing for an hour.
    """
    for path in folder.glob(f"*{UNFINISHED}"):
        name, _, process = path.name.removesuffix(UNFINISHED).rpartition(".")
        with suppress(FileNotFoundError):  # just finished, or removed by another process
            is_silent = time.time() - path.stat().st_mtime > _SECONDS_TO_WRITE
            if is_silent or (name.endswith(f".{socket.gethostname()}") and not _is_running(process)):
                remove(path)


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # it runs as another user
        return True
    return True


@contextmanager
def folder_beside(folder: Path, *, is_new: bool = False, replaces: bool = False) -> Iterator[Path]:
    """Create an empty temporary folder that is renamed to `folder` when the block ends without an error.

    A lock keeps other processes from writing the same folder at the same time.

    Args:
        folder: the folder to write.
        is_new: refuse if there is anything but an empty folder.
        replaces: replace whatever is there; see `replace_folder`.

    Raises:
        ConfigError: another process writes this folder, it is not empty although `is_new`, or it is a mount point.
        OSError: it cannot be written, or it is not empty although nothing is to be replaced.
    """
    folder = folder.resolve()
    if folder.is_mount():
        raise ConfigError("output folder is a mount point", where=str(folder), fix="give a folder inside of it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Next to both folders: a lock file inside one of them would be renamed along with it.
    lock_file = folder.with_name(folder.name + LOCK)
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
    """Create the folder anew, without leftovers of a killed process; remove it if the block ends with an error."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def replace_folder(folder: Path) -> None:
    """Rename the finished folder beside `folder` to `folder`; an existing one is set aside first and removed last.

    A kill at any point leaves the old or the new folder intact; `settle_folder` then puts it in place.
    """
    unfinished, old = (folder.with_name(folder.name + ending) for ending in (UNFINISHED, SET_ASIDE))
    if folder.exists():
        os.replace(folder, old)
    os.replace(unfinished, folder)
    remove(old)


def settle_folder(folder: Path) -> None:
    """Finish what a killed `replace_folder` began; only a process that may write `folder` may call it.

    A folder is set aside only once its replacement is finished, so if `folder` is missing, the new one is complete.
    """
    unfinished, old = (folder.with_name(folder.name + ending) for ending in (UNFINISHED, SET_ASIDE))
    if not old.exists():
        return
    if not folder.exists():
        os.replace(unfinished if unfinished.exists() else old, folder)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def folder_once(folder: Path) -> Iterator[Path]:
    """Create an empty temporary folder that becomes `folder` when the block ends without an error.

    Several processes, possibly on several nodes, may build the same folder at once. All write the same content, so
    the first to finish wins and the others discard theirs.

    Raises:
        OSError: it cannot be written.
    """
    unfinished = name_of_process(folder)
    yield from _filled(unfinished)
    try:
        os.rename(unfinished, folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def discard(unfinished: Path) -> None:
    """Remove what an interrupted `folder_once` left, even if a process on another node still writes to it."""
    # Under another name it cannot be renamed into place any more, in whatever order its files are removed.
    gone = unfinished.with_name(unfinished.name + ".gone")
    shutil.rmtree(gone, ignore_errors=True)
    unfinished.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def storage_errors(
    what: str, where: Path, *, kept: str = "", only: Container[int] | None = None, fix: str = ""
) -> Iterator[None]:
    """Turn errors of the file system into a StorageError that says which operation failed.

    Args:
        what: the operation that failed; starts the line.
        where: file or folder to name if the error does not name one.
        kept: what is not lost.
        only: error numbers to convert, e.g. `STORAGE_ERRNOS`; None: all.
        fix: what to do; by default, check the disk and run the same command again.

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
