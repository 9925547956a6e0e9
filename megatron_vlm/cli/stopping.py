"""How the commands of the data path end at a signal: at once, with one line."""

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
    """Let SIGTERM and SIGUSR1 end this process, which is not asked to finish what it does; and SIGINT, if it can go on.

    What is on the disk is as whole after this as after a kill, and workers die with this process.

    Args:
        kept: what the next start of the same command does not do again. Empty: nothing; then Ctrl-C stays Python's
            KeyboardInterrupt, at which temporary files are removed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # where no handler can be set
        return
    filters = os.environ.get("PYTHONWARNINGS", "")
    # multiprocessing's tracker cleans up after a process that ends so, and would tell about it.
    os.environ["PYTHONWARNINGS"] = f"{filters},ignore:resource_tracker".lstrip(",")
    rest = f", {kept}" if kept else ""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        name, start = signal.Signals(number).name, "\n" if os.isatty(2) else ""  # behind the progress bar
        line = f"{start}megatron-vlm: stopped by {name}; run the same command again{rest}\n"
        try:
            os.write(2, line.encode())  # not sys.stderr: it may be in the middle of a write itself
        finally:
            os._exit(ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.REQUEUE)

    numbers = [signal.SIGTERM, signal.SIGUSR1, *([signal.SIGINT] if kept else [])]
    # What the caller has this process ignore, a shell in the background SIGINT, it goes on ignoring.
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
