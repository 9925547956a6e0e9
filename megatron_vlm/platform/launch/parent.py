"""Tie the life of a process to that of the one that started it."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent_pid: int, death_signal: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send `death_signal` to this process when its parent dies, however it dies.

    Without it, ranks whose launcher was killed go on for as long as their collectives wait, on the run folder that a
    second job may use by then. Only Linux offers this; elsewhere it does nothing.

    Args:
        parent_pid: the process that started this one, as that process knows itself.
        death_signal: SIGKILL by default: a rank without its launcher has nothing to finish.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it died before the call
        os.kill(os.getpid(), death_signal)
