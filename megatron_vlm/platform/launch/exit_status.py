"""How a process ended: one line, one exit code, and the file that says both to a job script."""

import json
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_vlm.config import ExitCode, UserError
from megatron_vlm.platform.files.durable import STORAGE_ERRNOS, write_durably

MAX_LINE = 300
"""Longest line that a user error may take [characters]."""

_PROGRAM = "megatron-vlm"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitStatus:
    """How a rank, or a whole job, ended."""

    exit_code: int
    message: str
    """One line for a person; empty where all went well."""
    rank: int | None = None
    """The rank that ended so; None: the job as a whole."""
    iteration: int | None = None
    """Optimizer steps done."""
    launch_id: str = ""
    """Which start of the job this belongs to: tells a stale file from a fresh one."""
    traceback: str | None = None
    """Of an error that nobody foresaw."""
    unix_time: float = field(default_factory=time.time)

    @property
    def severity(self) -> int:
        """Return how much this explains: an error with a name goes before a crash, which may only follow from it."""
        if self.exit_code in (ExitCode.DONE, ExitCode.REQUEUE, ExitCode.INTERRUPTED):
            return 0 if self.exit_code == ExitCode.DONE else 1
        return 2 if self.exit_code == ExitCode.CRASH else 3


def describe_error(error: BaseException) -> ExitStatus:
    """Return exit code and line of an exception; only an unforeseen one keeps its traceback."""
    if isinstance(error, UserError):
        return ExitStatus(exit_code=int(error.exit_code), message=shorten(error))
    if isinstance(error, KeyboardInterrupt):
        return ExitStatus(exit_code=int(ExitCode.INTERRUPTED), message="interrupted")
    if isinstance(error, OSError) and error.errno in STORAGE_ERRNOS:
        where = f" ({error.filename})" if error.filename else ""
        fix = "check free space and permissions of the folder"
        return ExitStatus(exit_code=int(ExitCode.STORAGE), message=f"{error.strerror}{where}; fix: {fix}")
    text = str(error).strip().splitlines()
    summary = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    return ExitStatus(
        exit_code=int(ExitCode.CRASH),
        message=summary,
        traceback="".join(traceback.format_exception(type(error), error, error.__traceback__)),
    )


def shorten(error: UserError) -> str:
    """Return the error's line, cut in what was found so that place and fix stay readable."""
    budget = MAX_LINE - len(error_line(""))
    line = str(error)
    if len(line) <= budget:
        return line
    rest = len(line) - len(" ".join(error.what.split()))
    what = " ".join(error.what.split())[: max(20, budget - rest - 3)] + "..."
    return str(type(error)(what, where=error.where, fix=error.fix))[:budget]


def error_line(message: str) -> str:
    """Return `message` as the console shows it."""
    return f"{_PROGRAM}: error: {message}"


def write_exit_status(path: Path, status: ExitStatus) -> None:
    """Write `status` as JSON, atomically: a reader sees the old file or the whole new one."""
    write_durably(path, json.dumps(asdict(status), indent=2).encode(), is_shared=True)


def read_exit_status(path: Path) -> ExitStatus | None:
    """Return what `write_exit_status` wrote; None where there is no such file, or not a whole one."""
    try:
        return ExitStatus(**json.loads(path.read_text()))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def record_exit_status(path: Path, status: ExitStatus) -> None:
    """Write `status` unless another node of the same launch has already told more."""
    earlier = read_exit_status(path)
    if earlier is not None and earlier.launch_id == status.launch_id and earlier.severity >= status.severity:
        return
    write_exit_status(path, status)


def forget_exit_status(path: Path, launch_id: str) -> None:
    """Remove the file of an earlier launch, so that nobody reads yesterday's result as today's."""
    earlier = read_exit_status(path)
    if earlier is not None and earlier.launch_id == launch_id:
        return
    path.unlink(missing_ok=True)
