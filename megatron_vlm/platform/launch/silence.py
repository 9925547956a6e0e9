"""Notice ranks of this node that hang, and say which one the others wait for."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from os import kill
from pathlib import Path

from megatron_vlm.config.supervision import SupervisionConfig
from megatron_vlm.platform.launch.heartbeat import STACK_SIGNAL, Beat, Phase, read_beat, stack_path

_LOOK_SECONDS = 0.25
_STACK_SECONDS = 2.5
"""Time for a rank to write its stack when asked, on a busy machine."""
_WRITE_SECONDS = 0.1
"""Time from the first to the last line of a stack."""
_PY_SPY_SECONDS = 2.0
_TIMES_THE_LONGEST = 10.0
_OF_THE_TIMEOUT = 0.8
_MAX_STACK_LINES = 80
_SILENT_WITH_IT = 0.5
"""A rank that waits for one that hangs falls silent later, by at most this part of the limit."""
_DOING = {
    Phase.MEETING: ("its set-up", "setup_minutes"),
    Phase.SETUP: ("its set-up", "setup_minutes"),
    Phase.FIRST_STEP: ("its first step", "first_step_minutes"),
    Phase.STEP: ("a step", "step_minutes"),
    Phase.SAVE: ("a save", "save_minutes"),
}
# The innermost line of Python: `File "a.py", line 3 in f` of faulthandler, `f (a.py:3)` of py-spy.
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)')
_PY_SPY_FRAME = re.compile(r"^\s+(?P<name>\S+) \((?P<file>[^:()]+):(?P<line>\d+)\)", re.MULTILINE)
_WAITING = re.compile(r"torch/distributed/|megatron/core/(distributed|pipeline_parallel|tensor_parallel)/|/totals\.py$")


@dataclass(frozen=True, slots=True, kw_only=True)
class SilentRank:
    """The rank that a job hangs at, as far as its node can tell."""

    rank: int
    pid: int
    phase: Phase
    iteration: int
    """Steps done."""
    seconds: float
    """How long it was silent."""
    is_over_limit: bool
    """Whether that was too long; otherwise, another rank gave up waiting first."""
    is_stopped: bool
    """It, or a process that it started, was stopped by a signal."""
    is_waiting: bool
    """Its stack says that it waits for other ranks: the one that hangs may be on another node."""
    state: str
    """What it does, for a message."""
    stack: str
    """Of its threads; empty if it did not answer."""

    @property
    def message(self) -> str:
        """One line for the user, without what to do about it."""
        doing, key = _DOING[self.phase]
        who, when = f"rank {self.rank} (process {self.pid})", f"in {doing} after iteration {self.iteration}"
        if self.is_over_limit:
            return (
                f"{who} was silent for {self.seconds:.0f} s {when}, longer than supervision.{key} allows: {self.state}"
            )
        return (
            f"a collective took longer than parallel.distributed_timeout_minutes allows; the others seem to wait for "
            f"{who}, {when}, silent for {self.seconds:.0f} s: {self.state}"
        )


@dataclass(frozen=True, slots=True)
class _Limits:
    config: SupervisionConfig
    timeout_minutes: float

    def seconds(self, phase: Phase, longest_step: float) -> float:
        if phase == Phase.STEP and self.config.step_minutes is None:
            return max(60 * self.timeout_minutes * _OF_THE_TIMEOUT, longest_step * _TIMES_THE_LONGEST)
        return 60 * getattr(self.config, _DOING[phase][1])


@dataclass(slots=True)
class _Seen:
    beat: Beat = field(default_factory=Beat)
    silence: float = 0.0
    """Seconds that this process has watched since the last sign of life."""


class SilenceWatch:
    """Looks at the signs of life of the ranks of this node.

    Silence is counted in the time that this process itself runs: a job that was suspended as a whole has not hung.

    Args:
        folder: where the ranks leave their signs of life.
        config: the limits.
        timeout_minutes: how long collectives wait.
    """

    def __init__(self, folder: Path, config: SupervisionConfig, timeout_minutes: float) -> None:
        self._folder, self._limits = folder, _Limits(config, timeout_minutes)
        self._seen: dict[int, _Seen] = {}
        self._longest_step = 0.0
        self._last_look = time.monotonic()

    def look(self, pids: Mapping[int, int]) -> SilentRank | None:
        """Return the rank that the job hangs at, if one has been silent for too long.

        Args:
            pids: processes of the ranks that run, by rank.
        """
        passed = time.monotonic() - self._last_look
        if passed < _LOOK_SECONDS or not pids:
            return None
        self._last_look += passed
        for rank in pids:
            self._listen(rank, min(passed, 2 * _LOOK_SECONDS))
        live = {rank: self._seen[rank] for rank in pids}
        # A rank may be ahead of the others, waiting in the next phase.
        limit = max(self._limits.seconds(seen.beat.phase, self._longest_step) for seen in live.values())
        if all(seen.silence < limit for seen in live.values()):
            return None
        silent = {rank: pids[rank] for rank in pids if live[rank].silence >= limit * _SILENT_WITH_IT}
        return self.find_culprit(silent, is_over_limit=True)

    def is_setting_up(self) -> bool:
        """Return whether no rank has begun its first step, so that there is nothing to save."""
        return all(seen.beat.phase <= Phase.SETUP for seen in self._seen.values())

    def is_meeting(self) -> bool:
        """Return whether no rank is known to have met those of other nodes."""
        return all(seen.beat.phase == Phase.MEETING for seen in self._seen.values())

    def find_culprit(self, pids: Mapping[int, int], *, is_over_limit: bool = False) -> SilentRank | None:
        """Return the rank among some that the others wait for; None if there are none.

        That is one that was stopped, else one that does not wait in a collective, else the one that is behind.
        """
        stacks = _read_stacks(self._folder, pids)
        found = [self._describe(rank, pid, stacks.get(rank, ""), is_over_limit) for rank, pid in pids.items()]
        return min(
            found,
            key=lambda item: (not item.is_stopped, item.is_waiting, item.iteration, -item.seconds, item.rank),
            default=None,
        )

    def _listen(self, rank: int, passed: float) -> None:
        seen, beat = self._seen.setdefault(rank, _Seen()), read_beat(self._folder, rank)
        if beat.count == 0 and seen.beat.count:
            seen.silence = 0.0  # somebody cleared the temporary folder: nothing is known, so nobody is accused
            return
        if beat == seen.beat:
            seen.silence += passed
            return
        if seen.beat.phase == beat.phase == Phase.STEP:
            self._longest_step = max(self._longest_step, seen.silence)
        seen.beat, seen.silence = beat, 0.0

    def _describe(self, rank: int, pid: int, stack: str, is_over_limit: bool) -> SilentRank:
        seen = self._seen.get(rank, _Seen())
        stopped = next(_stopped_processes(pid), None)
        frame = _innermost_frame(stack)
        is_waiting = stopped is None and frame is not None and bool(_WAITING.search(frame["file"]))
        return SilentRank(
            rank=rank,
            pid=pid,
            phase=seen.beat.phase,
            iteration=seen.beat.iteration,
            seconds=seen.silence,
            is_over_limit=is_over_limit,
            is_stopped=stopped is not None,
            is_waiting=is_waiting,
            state=_describe_state(pid, stopped, frame, is_waiting=is_waiting),
            stack=stack,
        )


def _describe_state(pid: int, stopped: int | None, frame: Mapping[str, str] | None, *, is_waiting: bool) -> str:
    if stopped is not None:
        who = "it" if stopped == pid else f"process {stopped}, which it started,"
        return f"{who} is stopped (SIGSTOP or a debugger)"
    if frame is None:
        return "it does not answer"
    where = f"{Path(frame['file']).name}:{frame['line']} {frame['name']}"
    return f"it waits for other ranks in {where}" if is_waiting else f"it hangs in {where}"


def _stopped_processes(session: int) -> Iterator[int]:
    """Yield the stopped processes among a rank and those that it started, which share its session."""
    with suppress(OSError):  # not Linux
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError, IndexError, ValueError):  # it has just ended
                # The name of the program, in parentheses, may contain anything.
                state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
                if state in ("T", "t") and int(its_session) == session:
                    yield int(path.parent.name)


def _read_stacks(folder: Path, pids: Mapping[int, int]) -> dict[int, str]:
    """Ask all ranks for their stacks at once: py-spy if it is installed and may look, else the ranks themselves."""
    tool = shutil.which("py-spy")
    watched = {rank: _start_py_spy(tool, pid) for rank, pid in pids.items()} if tool else {}
    deadline = time.monotonic() + _PY_SPY_SECONDS
    stacks = {}
    for rank, process in watched.items():
        with suppress(subprocess.TimeoutExpired):
            stacks[rank] = process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0]
        process.kill()
        process.wait()
    rest = [rank for rank in pids if not stacks.get(rank, "").strip()]
    for rank in rest:
        # A rank that has no handler yet would die of the signal.
        if stack_path(folder, rank).exists():
            with suppress(ProcessLookupError):
                kill(pids[rank], STACK_SIGNAL)
    deadline = time.monotonic() + _STACK_SECONDS
    able = [rank for rank in rest if pids[rank] not in _stopped_processes(pids[rank])]
    while time.monotonic() < deadline and any(not _written_stack(folder, rank) for rank in able):
        time.sleep(0.05)
    time.sleep(_WRITE_SECONDS)
    stacks |= {rank: _written_stack(folder, rank) for rank in rest}
    return {rank: "\n".join(text.splitlines()[-_MAX_STACK_LINES:]) for rank, text in stacks.items()}


def _start_py_spy(tool: str, pid: int) -> subprocess.Popen:
    command = [tool, "dump", "--nonblocking", "--pid", str(pid)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def _written_stack(folder: Path, rank: int) -> str:
    try:
        return stack_path(folder, rank).read_text(errors="replace")
    except OSError:
        return ""


def _innermost_frame(stack: str) -> Mapping[str, str] | None:
    """Return the innermost frame of the main thread: the last thread of faulthandler, the first of py-spy."""
    main = re.split(r"^(?:Current thread|Thread) ", stack, flags=re.MULTILINE)
    for pattern, blocks in ((_FRAME, main[::-1]), (_PY_SPY_FRAME, main)):
        for block in blocks:
            found = pattern.search(block)
            if found:
                return found.groupdict()
    return None
