"""The cores that this process may use."""

import os


def count_cores() -> int:
    """Return how many cores this process may use: where a batch system bound it to some, only those."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
