"""The temporary folder of a job on this node: for what its processes tell each other, and for their helpers.

A process that is killed cannot remove what it made. So the launcher makes one folder for all and removes it at its end.
The next launcher removes that of one that was killed.
"""

import multiprocessing
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_vlm.platform.files.locks import locked

_PREFIX = "megatron_vlm_"
_LOCK_NAME = f"launcher_{socket.gethostname()}.lock"
"""Names the node: where nodes share a temporary folder, the file system may not share its locks."""
_MAX_SOCKET_PATH, _SOCKET_NAME = 107, len("/listener-xxxxxxxx")
"""Bytes of the path of a Unix socket, and of the name that multiprocessing gives one."""


@contextmanager
def job_folder() -> Iterator[Path]:
    """Make an empty folder, and remove it with all that is in it at the end.

    Raises:
        OSError: it cannot be made.
    """
    _remove_left_behind(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as folder:
        with locked(Path(folder) / _LOCK_NAME):
            yield Path(folder)


def keep_helpers_in(folder: Path) -> None:
    """Have this process, and those that it forks, make multiprocessing's sockets in `folder`.

    By default each makes a folder of its own, `pymp-*`, which stays when it is killed, as loader workers always are. A
    path that is too long for a socket is left out.
    """
    if len(os.fsencode(folder)) + _SOCKET_NAME <= _MAX_SOCKET_PATH:
        # Inherited by children; `multiprocessing.util.get_temp_dir` looks here first and has no other door.
        multiprocessing.current_process()._config["tempdir"] = str(folder)  # type: ignore[attr-defined]


def _remove_left_behind(parent: Path) -> None:
    """Remove the folders of launchers that were killed, whose lock the kernel has released."""
    for folder in parent.glob(f"{_PREFIX}*"):
        # A folder without the file is being made, or is not a launcher's.
        with suppress(OSError):  # somebody else's, or removed meanwhile
            if not (folder / _LOCK_NAME).is_file() or folder.stat().st_uid != os.getuid():
                continue
            with locked(folder / _LOCK_NAME) as lock:
                if lock is not None:
                    shutil.rmtree(folder, ignore_errors=True)
