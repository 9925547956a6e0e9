"""How the data commands end on a signal: at once, with one line."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from megatron_vlm.config import ExitCode


@contextmanager
def stops_at_once(kept: str) -> Iterator[None]:
    """End this process at once on SIGTERM and SIGUSR1, and on SIGINT if the same command can continue the work.

    The files on disk are then in the same state as after kill -9, from which every command recovers. Workers die with
    this process.

    Args:
        kept: the work that the next run of the same command does not repeat. If empty, Ctrl-C stays Python's
            KeyboardInterrupt, so that temporary files are removed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can set handlers
        return
    filters = os.environ.get("PYTHONWARNINGS", "")
    # multiprocessing's resource tracker cleans up after this process, and would print a warning about it.
    os.environ["PYTHONWARNINGS"] = f"{filters},ignore:resource_tracker".lstrip(",")
    rest = f", {kept}" if kept else ""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        name, start = signal.Signals(number).name, "\n" if os.isatty(2) else ""  # after the progress bar
        line = f"{start}megatron-vlm: stopped by {name}; run the same command again{rest}\n"
        try:
            os.write(2, line.encode())  # not sys.stderr, which may be in the middle of a write
        finally:
            os._exit(ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.REQUEUE)

    numbers = [signal.SIGTERM, signal.SIGUSR1, *([signal.SIGINT] if kept else [])]
    # Signals that the caller set to be ignored stay ignored: a shell does so with SIGINT for background jobs.
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        os.environ["PYTHONWARNINGS"] = filters
        if not filters:
            del os.environ["PYTHONWARNINGS"]
