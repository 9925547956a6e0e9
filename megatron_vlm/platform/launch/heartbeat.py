"""The signs of life of a rank: a count in a file of its node, raised wherever its main thread gets on.

A thread that beats would beat for a rank that hangs. Without a launcher, nothing is written.
"""

import enum
import faulthandler
import mmap
import signal
import struct
from dataclasses import dataclass
from pathlib import Path

STACK_SIGNAL = signal.SIGUSR2
"""Has a rank write the stacks of its threads to its stack file, even if its main thread hangs in a library."""
_FORMAT = struct.Struct("<QQQ")


class Phase(enum.IntEnum):
    """What a rank does; each phase has its own limit of silence."""

    MEETING = 0
    """Part of the set-up: until all ranks of the job have met."""
    SETUP = 1
    FIRST_STEP = 2
    """Of the run or of a validation: loaders start, kernels are compiled."""
    STEP = 3
    SAVE = 4


@dataclass(frozen=True, slots=True)
class Beat:
    """The last sign of life of a rank."""

    count: int = 0
    phase: Phase = Phase.MEETING
    iteration: int = 0
    """Steps done."""


class _Pulse:
    """The file of this process."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(_FORMAT.size))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _FORMAT.size)
        self._count, self._phase, self._iteration = 0, Phase.MEETING, 0

    def beat(self, phase: Phase | None, iteration: int | None) -> None:
        self._count += 1
        self._phase = self._phase if phase is None else phase
        self._iteration = self._iteration if iteration is None else iteration
        _FORMAT.pack_into(self._memory, 0, self._count, self._phase, self._iteration)


_pulse: _Pulse | None = None


def start_beating(folder: Path, rank: int) -> None:
    """Let the launcher see from now on that this rank lives, and ask it for its stack."""
    global _pulse
    # Stays open as long as this process: faulthandler writes to its descriptor.
    stack = stack_path(folder, rank).open("w")
    faulthandler.register(STACK_SIGNAL, file=stack, all_threads=True)
    _pulse = _Pulse(beat_path(folder, rank))
    beat()


def beat(phase: Phase | None = None, *, iteration: int | None = None) -> None:
    """Give a sign of life, at the cost of a microsecond.

    Args:
        phase: what begins; None: what this rank did before goes on.
        iteration: steps done; None: as before.
    """
    if _pulse is not None:
        _pulse.beat(phase, iteration)


def read_beat(folder: Path, rank: int) -> Beat:
    """Return the last sign of life of a rank of this node; a rank that has not given one yet has met nobody."""
    try:
        count, phase, iteration = _FORMAT.unpack(beat_path(folder, rank).read_bytes())
        return Beat(count, Phase(phase), iteration)
    except (OSError, struct.error, ValueError):
        return Beat()


def beat_path(folder: Path, rank: int) -> Path:
    """Return the file in which a rank counts its signs of life."""
    return folder / f"rank_{rank:05d}.beat"


def stack_path(folder: Path, rank: int) -> Path:
    """Return the file to which a rank writes its stacks when asked."""
    return folder / f"rank_{rank:05d}.stack"
