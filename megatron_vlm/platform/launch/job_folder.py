"""The temporary folder of a job on this node: for what its processes tell each other, and for their helpers.

A process that is killed cannot remove what it made. So the launcher makes one folder for all and removes it at its end.
The next launcher removes that of one that was killed.
"""

import functools
import multiprocessing
import multiprocessing.util
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_vlm.config import ConfigError
from megatron_vlm.platform.files.locks import locked

_PREFIX = "megatron_vlm_"
_LOCK_NAME = f"launcher_{socket.gethostname()}.lock"
"""Names the node: where nodes share a temporary folder, the file system may not share its locks."""
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
"""Where sockets go if the path of the user's temporary folder is too long for them."""
_MAX_SOCKET_PATH = 107
"""Bytes of the path of a Unix socket."""
_LONGEST_NAME = len("/megatron_vlm_xxxxxxxx/xxxxxxxx/listener-xxxxxxxx")
"""Bytes of the folders made here, one in the other, and of the name that multiprocessing gives a socket."""


@contextmanager
def job_folder() -> Iterator[Path]:
    """Make an empty folder, and remove it with all that is in it at the end.

    Raises:
        ConfigError: the paths of all temporary folders are too long for sockets.
        OSError: it cannot be made.
    """
    parent = _parent_of_sockets()
    _remove_left_behind(parent)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent, ignore_cleanup_errors=True) as folder:
        with locked(Path(folder) / _LOCK_NAME):
            yield Path(folder)


def keep_helpers_in(folder: Path | None) -> None:
    """Have this process, and those that it forks, make multiprocessing's sockets in `folder`.

    By default each makes a folder of its own, `pymp-*`, which stays when it is killed, as loader workers always are,
    and where a socket's path may be too long.

    Args:
        folder: of the job; None: no launcher has made one, so this process makes its own, and removes it at its end.

    Raises:
        ConfigError: as for `job_folder`, without a folder.
    """
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="pymp-", dir=_parent_of_sockets()))
        # Unlike atexit, also at the end of a process that multiprocessing started, and never at that of a fork.
        removal = functools.partial(shutil.rmtree, folder, ignore_errors=True)
        multiprocessing.util.Finalize(None, removal, exitpriority=-100)
    # Inherited by children; `multiprocessing.util.get_temp_dir` looks here first and has no other door.
    multiprocessing.current_process()._config["tempdir"] = str(folder)  # type: ignore[attr-defined]


def make_helpers_folder() -> Path:
    """Make a folder in the one for helpers, for some of them whose files are removed before this process ends.

    Raises:
        ConfigError, OSError: as for `job_folder`, if this process had no folder for helpers yet.
    """
    if multiprocessing.current_process()._config.get("tempdir") is None:  # type: ignore[attr-defined]
        keep_helpers_in(None)
    return Path(tempfile.mkdtemp(prefix="", dir=multiprocessing.util.get_temp_dir()))


def _parent_of_sockets() -> Path:
    """Return the user's temporary folder, or one with a shorter path if that of a socket in it would be too long."""
    wanted = tempfile.gettempdir()
    for folder in (wanted, *_SHORT_FOLDERS):
        is_short = len(os.fsencode(folder)) + _LONGEST_NAME <= _MAX_SOCKET_PATH
        if is_short and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
            return Path(folder)
    raise ConfigError(
        f"the path of the temporary folder is too long for sockets, and {', '.join(_SHORT_FOLDERS)} cannot be written",
        where=wanted,
        fix=f"set TMPDIR to a folder whose path has at most {_MAX_SOCKET_PATH - _LONGEST_NAME} bytes",
    )


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
