"""End a process when its parent dies."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent_pid: int, death_signal: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send `death_signal` to this process when its parent dies, for whatever reason.

    Without this, ranks whose launcher was killed would run on until their collectives time out, in a run folder that
    another job may be using by then. Only Linux offers this; elsewhere, the call does nothing.

    Args:
        parent_pid: id of the process that started this one, as reported by that process.
        death_signal: SIGKILL by default, since a rank without its launcher has nothing to finish.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it died before the call
        os.kill(os.getpid(), death_signal)
