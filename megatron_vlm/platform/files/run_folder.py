"""The folder of a run: names of its files, and a lock that admits one job at a time."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vlm.config import ConfigError
from megatron_vlm.platform.files.locks import locked

CONFIG_NAME = "config.yaml"
EXIT_STATUS_NAME = "exit_status.json"
METRICS_NAME = "metrics.jsonl"
PLAN_FOLDER = "plan"
_LOCK_NAME = ".lock"


@contextmanager
def hold_run_folder(run_dir: Path) -> Iterator[None]:
    """Create `run_dir` and lock it; the kernel releases the lock however this process ends.

    Raises:
        ConfigError: another job has locked it, or its path is a file.
        OSError: it cannot be created or written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError("run_dir is a file, not a folder", where=str(run_dir), fix="choose another run_dir") from None
    path = run_dir / _LOCK_NAME
    with locked(path) as lock:
        if lock is None:
            raise ConfigError(
                f"another job uses this run folder: {path.read_text().strip() or 'unknown'}",
                where=str(run_dir),
                fix="wait for it, stop it, or choose another run_dir",
            )
        lock.truncate(0)
        lock.write(f"{socket.gethostname()} process {os.getpid()}\n".encode())
        lock.flush()
        yield
