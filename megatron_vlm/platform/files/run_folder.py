"""The folder of a run: names of its files, and a lock that admits one job at a time."""

import errno
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from megatron_vlm.config import ConfigError, StorageError
from megatron_vlm.platform.files.locks import locked, locked_for_reading

CONFIG_NAME = "config.yaml"
EXIT_STATUS_NAME = "exit_status.json"
METRICS_NAME = "metrics.jsonl"
EVENTS_NAME = "events.jsonl"
CHECKPOINTS_FOLDER = "checkpoints"
PLAN_FOLDER = "plan"
LEDGER_FOLDER = "ledger"
TENSORBOARD_FOLDER = "tensorboard"
_FILES = (CONFIG_NAME, METRICS_NAME, EVENTS_NAME)
_FOLDERS = (CHECKPOINTS_FOLDER, PLAN_FOLDER, LEDGER_FOLDER, TENSORBOARD_FOLDER)
LOCK_NAME = "run.lock"
_ATTEMPT = re.compile(rb"attempt (\d{1,9})")


@contextmanager
def hold_run_folder(run_dir: Path, job: str) -> Iterator[None]:
    """Create `run_dir` and lock it; the kernel releases the lock however this process ends.

    The lock names this host and process, the job, and its attempt: how often the folder was held before, plus one. A
    folder in which no run began has no lock afterwards, and is removed if it is new and empty.

    Args:
        run_dir: the folder.
        job: what holds it, for the message to a second job.

    Raises:
        ConfigError: another job has locked it, or its path is a file.
        OSError: it cannot be created or written.
    """
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError("run_dir is a file, not a folder", where=str(run_dir), fix="choose another run_dir") from None
    path = run_dir / LOCK_NAME
    with locked(path) as lock:
        if lock is None:
            raise _in_use(run_dir, fix="wait for it, stop it, or choose another run_dir")
        _sign(lock, job)
        try:
            yield
        finally:
            if not (run_dir / CONFIG_NAME).exists():
                _leave(path, made)


@contextmanager
def read_run_folder(run_dir: Path) -> Iterator[None]:
    """Keep jobs that would change `run_dir` away, for one that only reads it and need not be allowed to write it.

    Raises:
        ConfigError: a job has locked it.
        OSError: it cannot be read.
    """
    with locked_for_reading(run_dir / LOCK_NAME) as is_free:
        if not is_free:
            raise _in_use(run_dir, fix="wait for it, or stop it")
        yield


def check_entries(run_dir: str | Path) -> None:
    """Check that no folder stands where a run writes a file, and nothing else where it makes a folder.

    Raises:
        StorageError: something does, which could come out only at the first save.
    """
    files, folders = ([Path(run_dir) / name for name in names] for names in (_FILES, _FOLDERS))
    faults = [(path, errno.EISDIR) for path in files if path.is_dir()]
    faults += [(path, errno.ENOTDIR) for path in folders if os.path.lexists(path) and not path.is_dir()]
    for path, number in faults:
        raise StorageError(os.strerror(number), where=str(path), fix="move away what stands there")


def _in_use(run_dir: Path, fix: str) -> ConfigError:
    return ConfigError(f"another job uses this run folder: {_holder(run_dir / LOCK_NAME)}", where=str(run_dir), fix=fix)


def _sign(lock: BinaryIO, job: str) -> None:
    lock.seek(0)
    earlier = _ATTEMPT.search(lock.read(1000))
    attempt = int(earlier[1]) + 1 if earlier else 1
    lock.truncate(0)
    lock.write(f"host {socket.gethostname()}, process {os.getpid()}, job {job}, attempt {attempt}\n".encode())
    lock.flush()


def _holder(path: Path) -> str:
    with suppress(OSError):
        return path.read_bytes()[:200].decode(errors="replace").strip() or "unknown"
    return "unknown"


def _leave(lock: Path, made: list[Path]) -> None:
    """Remove the lock, and those of the folders `made` that are empty, the deepest first."""
    with suppress(OSError):
        lock.unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()
