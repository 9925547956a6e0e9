"""The folder of a run: names of its files, and one job at a time."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from megatron_vlm.config import ConfigError

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
EXIT_STATUS_NAME = "exit_status.json"
METRICS_NAME = "metrics.jsonl"
_LOCK_NAME = ".lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def hold_run_folder(run_dir: Path) -> Iterator[None]:
    """Make `run_dir` and hold it; the kernel lets go of it however this process ends.

    Raises:
        ConfigError: another job holds it, or its path is a file.
        OSError: it cannot be made or written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError("run_dir is a file, not a folder", where=str(run_dir), fix="choose another run_dir") from None
    with (run_dir / _LOCK_NAME).open("a+") as lock:
        _take(lock, run_dir)
        lock.truncate(0)
        lock.write(f"{socket.gethostname()} process {os.getpid()}\n")
        lock.flush()
        yield


def _take(lock: TextIO, run_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        raise ConfigError(
            f"another job trains in this run folder: {holder}",
            where=str(run_dir),
            fix="wait for it, stop it, or choose another run_dir",
        ) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning("%s: this file system has no locks; start no second job on this folder", run_dir)
