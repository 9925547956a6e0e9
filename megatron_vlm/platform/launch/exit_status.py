"""How a process ended: one line, an exit code, and a file that tells job scripts both."""

import json
import os
import re
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_vlm.config import ExitCode, UserError
from megatron_vlm.platform.files.durable import STORAGE_ERRNOS, WRONG_KIND_ERRNOS, write_durably

MAX_LINE = 300
"""Longest line of a user error [characters]."""

_MAX_PLACE = 120
"""Longest place in a line that is too long [characters]; of a path, both ends are shown."""
_PROGRAM = "megatron-vlm"
# gloo, NCCL, and the store through which the ranks meet.
_TIMED_OUT = re.compile(
    r"Timed out waiting \d+ms|collective operation timeout|wait timeout after \d+ms|"
    r"Timed out after \d+ seconds waiting for clients|client socket has timed out after"
)
# What gloo and NCCL say when another rank has gone.
_LOST = re.compile(r"gloo/|Connection (closed|reset|refused)|Broken pipe|ncclRemoteError|NCCL (error|communicator)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitStatus:
    """How a rank or a whole job ended."""

    exit_code: int
    message: str
    """One line for the user; empty after success."""
    rank: int | None = None
    """The rank that ended this way; None: the job as a whole."""
    iteration: int | None = None
    """Completed optimizer steps."""
    launch_id: str = ""
    """The start of the job that this belongs to; distinguishes a stale file from a fresh one."""
    traceback: str | None = None
    """Traceback of an unforeseen error."""
    is_symptom: bool = False
    """Whether this may follow from the end of another rank, such as a lost connection or a wait in vain."""
    unix_time: float = field(default_factory=time.time)

    @property
    def severity(self) -> int:
        """Return how much this explains: 4 a foreseen error, 3 a crash or hang, 2 what follows from one, 1 a stop."""
        if self.exit_code in (ExitCode.DONE, ExitCode.REQUEUE, ExitCode.INTERRUPTED):
            return 0 if self.exit_code == ExitCode.DONE else 1
        if self.exit_code in (ExitCode.CRASH, ExitCode.TIMEOUT):
            return 2 if self.is_symptom else 3
        return 4


def describe_error(error: BaseException, place: str | None = None) -> ExitStatus:
    """Return the exit code and line for an exception; only an unforeseen one keeps its traceback.

    Args:
        error: the exception.
        place: where it probably was if it is an error of the system that names no file, as when a file that is open
            cannot be written; None: not known.
    """
    if isinstance(error, UserError):
        return ExitStatus(exit_code=int(error.exit_code), message=shorten(error))
    if isinstance(error, KeyboardInterrupt):
        return ExitStatus(exit_code=int(ExitCode.INTERRUPTED), message="interrupted")
    if isinstance(error, OSError) and error.errno in STORAGE_ERRNOS:
        where = f" ({error.filename or place})" if error.filename or place else ""
        fix = "check free space and permissions of the folder"
        if error.errno in WRONG_KIND_ERRNOS:
            fix = "move away what stands there"
        return ExitStatus(exit_code=int(ExitCode.STORAGE), message=f"{error.strerror}{where}; fix: {fix}")
    if isinstance(error, RuntimeError) and _TIMED_OUT.search(str(error)):
        message = f"timed out: {str(error).splitlines()[0][:MAX_LINE]}"
        return ExitStatus(exit_code=int(ExitCode.TIMEOUT), message=message, is_symptom=True)
    text = str(error).strip().splitlines()
    summary = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    return ExitStatus(
        exit_code=int(ExitCode.CRASH),
        message=summary,
        is_symptom=_lost_another_rank(error),
        traceback="".join(traceback.format_exception(type(error), error, error.__traceback__)),
    )


def _lost_another_rank(error: BaseException) -> bool:
    is_of_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    return is_of_torch or (isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None)


def shorten(error: UserError) -> str:
    """Return the line of the error, shortened so that place and fix remain complete."""
    budget = MAX_LINE - len(error_line(""))
    line = str(error)
    if len(line) <= budget:
        return line
    what, where = " ".join(error.what.split()), error.where
    if where is not None and len(where) > _MAX_PLACE:
        where = f"{where[: _MAX_PLACE // 2]}...{where[3 - _MAX_PLACE // 2 :]}"
    rest = len(str(type(error)("-", where=where, fix=error.fix))) - 1
    if len(what) > budget - rest:
        what = what[: max(20, budget - rest - 3)] + "..."
    return str(type(error)(what, where=where, fix=error.fix))[:budget]


def error_line(message: str) -> str:
    """Return `message` as shown on the console."""
    return f"{_PROGRAM}: error: {message}"


def say(text: str) -> None:
    """Write to stderr; if that is a file on a full disk, say nothing more, so that the exit code stays what it is."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def write_exit_status(path: Path, status: ExitStatus) -> None:
    """Write `status` as JSON, atomically: readers see the old file or the complete new one."""
    write_durably(path, json.dumps(asdict(status), indent=2).encode(), is_shared=True)


def read_exit_status(path: Path) -> ExitStatus | None:
    """Return the status in a file; None if the file is missing, incomplete or damaged."""
    try:
        return ExitStatus(**json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None


def record_exit_status(path: Path, status: ExitStatus) -> None:
    """Write `status` unless another node of the same launch has already recorded a more telling one."""
    earlier = read_exit_status(path)
    if earlier is not None and earlier.launch_id == status.launch_id and earlier.severity >= status.severity:
        return
    write_exit_status(path, status)


def forget_exit_status(path: Path, launch_id: str) -> None:
    """Remove the file of an earlier launch, so that nobody takes it for the result of this one."""
    earlier = read_exit_status(path)
    if earlier is not None and earlier.launch_id == launch_id:
        return
    path.unlink(missing_ok=True)
