"""How long this process may run, by its own clock: for clusters that end a job without a signal.

Import this where a process begins: its time counts from there.
"""

import time

_started = time.monotonic()


def is_time_over(minutes: float | None) -> bool:
    """Return whether this process has run so many minutes; None: there is no limit."""
    return minutes is not None and time.monotonic() - _started >= minutes * 60
