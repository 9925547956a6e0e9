"""Start a command, show how far it is, and end it with everything it started."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_TO_END = 60.0


class CommandError(Exception):
    """A command ended with an exit code that was not wanted; the message holds the end of its log."""


def run_command(command: Sequence[str], log: Path, describe: Callable[[], str] | None = None) -> None:
    """Run a command to its end, its output in `log`, and show progress.

    Args:
        command: program and arguments.
        log: file that takes standard output and error; an older one goes on.
        describe: says how far the command is; None: the last line of its log.

    Raises:
        CommandError: it ended with another code than 0.
    """
    with start_command(command, log) as process:
        watch(process, describe or (lambda: last_line(log)))
    if process.returncode:
        raise CommandError(f"{' '.join(command)}\nended with exit code {process.returncode}; {_tail(log)}")


@contextmanager
def start_command(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in a process group of its own; the group is gone when the block is left."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        process = subprocess.Popen(
            list(command), stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            yield process
        finally:
            end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, by SIGTERM and after a minute by SIGKILL."""
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_SECONDS_TO_END)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def watch(
    process: subprocess.Popen[bytes], describe: Callable[[], str], until: Callable[[], bool] | None = None
) -> None:
    """Show progress until the process ends, or until `until` says so."""
    live = sys.stderr.isatty()
    shown, next_line = "", time.monotonic() + _SECONDS_BETWEEN_LINES
    while process.poll() is None and not (until and until()):
        time.sleep(0.2)
        text = describe()[:110]
        if live and text != shown:
            sys.stderr.write(f"\r\x1b[K      {text}")
            sys.stderr.flush()
        elif not live and text and time.monotonic() > next_line:
            sys.stderr.write(f"      {text}\n")
            next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        shown = text
    if live:
        sys.stderr.write("\r\x1b[K")


def find_rank(launcher: int, rank: int) -> int | None:
    """Return the process id of a rank that `megatron-vlm train` started, or None while there is none."""
    try:
        children = psutil.Process(launcher).children(recursive=True)
    except psutil.NoSuchProcess:
        return None
    for child in children:
        try:
            if "megatron_vlm.cli.worker" in child.cmdline() and child.environ().get("RANK") == str(rank):
                return child.pid
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return None


def last_line(log: Path) -> str:
    """Return the last line of a log that has text; a progress bar's last state counts as a line."""
    if not log.exists():
        return ""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 4096))
        text = stream.read().decode(errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    return next((line for line in reversed(lines) if line), "")


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return f"the end of {log}:\n" + "\n".join(f"  {line}" for line in lines[-15:] if line.strip())
