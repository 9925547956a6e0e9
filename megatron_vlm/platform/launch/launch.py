"""Start the ranks of this node, forward signals to them, and end all of them when one has died.

torch's elastic launcher is not used, but its environment variables are, so that ranks also run under torchrun. With
torch 2.13, its agent waits 30 s for the other ranks after a death, whatever `shutdown_timeout` says (measured: 31 s
until a job with one killed and one blocked rank ended; 3.2 s here). A second signal during that time leaves them
running, and importing it takes longer than everything here.
"""

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

from megatron_vlm.config import ExitCode
from megatron_vlm.platform.launch.nodes import NodeLink
from megatron_vlm.platform.launch.silence import SilenceWatch, SilentRank

logger = logging.getLogger(__name__)

GRACE_SECONDS = 3.0
"""Time for the other ranks to report why they ended, once one has failed."""
INTERRUPTS_TO_KILL = 3
"""SIGINTs after which the ranks are killed in the middle of whatever they do."""
_POLL_SECONDS = 0.05
_DEATH_SECONDS = 10.0
_SETUP_STOP_SECONDS = 10.0
"""After a signal, for ranks that have nothing to save; where they wait in C++ for others, they cannot hear it."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What asks a rank to save and end; a scheduler or `kill` may send them to every process of the job."""
FORWARDED_AS = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    # Ctrl-C and a closed terminal mean the same as a signal from the scheduler; ranks have one way to stop.
    signal.SIGINT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}
"""The signal that the ranks receive for each signal to this process."""
# After these exit codes, the other ranks may finish their work, for example a checkpoint.
_ORDERLY = (ExitCode.DONE, ExitCode.REQUEUE)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeJob:
    """The ranks to start on this node."""

    command: Sequence[str]
    environment: Mapping[str, str]
    """Environment of a rank, complete except for the variables that differ between ranks."""
    num_workers: int
    node_rank: int = 0
    num_nodes: int = 1
    master_address: str = "127.0.0.1"
    master_port: int

    def worker_environment(self, local_rank: int) -> dict[str, str]:
        """Return the environment of one rank, with torch's own variables."""
        return {
            **self.environment,
            "RANK": str(self.node_rank * self.num_workers + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.num_nodes * self.num_workers),
            "LOCAL_WORLD_SIZE": str(self.num_workers),
            "GROUP_RANK": str(self.node_rank),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEnd:
    """How one rank ended."""

    rank: int
    pid: int
    exit_code: int
    """As in subprocess: negative for a signal."""
    was_killed_here: bool = False
    """Whether this launcher killed it after another rank had failed."""
    unix_time: float = field(default_factory=time.time)
    """When it was found to have ended."""

    @property
    def signal_name(self) -> str | None:
        """Name of the signal that ended it; None if it ended by itself."""
        if self.exit_code >= 0:
            return None
        try:
            return signal.Signals(-self.exit_code).name
        except ValueError:  # a real-time signal
            return f"signal {-self.exit_code}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeEnd:
    """How all ranks of this node ended, in the order in which they ended."""

    workers: tuple[WorkerEnd, ...]
    stop_signal: signal.Signals | None
    """The first signal that asked the job to stop; None if there was none."""
    silent: SilentRank | None = None
    """The rank at which the job hung; None if it did not."""
    missing: tuple[int, ...] = ()
    """Nodes that did not come up in time."""


@dataclass(slots=True)
class _Supervisor:
    """Processes of this node, by rank."""

    job: NodeJob
    watch: SilenceWatch | None
    nodes: NodeLink | None
    silent: SilentRank | None = None
    missing: tuple[int, ...] = ()
    processes: dict[int, subprocess.Popen] = field(default_factory=dict)
    ends: dict[int, WorkerEnd] = field(default_factory=dict)
    stop_signal: signal.Signals | None = None
    kill_at: float | None = None
    stop_at: float = 0.0
    is_stop_announced: bool = False
    num_interrupts: int = 0

    def start(self) -> None:
        for local_rank in range(self.job.num_workers):
            environment = self.job.worker_environment(local_rank)
            # Each rank has its own session, so Ctrl-C reaches it only once, through this process, and killing the
            # process group of a rank also kills its data loaders.
            self.processes[int(environment["RANK"])] = subprocess.Popen(
                list(self.job.command), env=environment, start_new_session=True, stdin=subprocess.DEVNULL
            )
        if self.stop_signal is not None:  # it arrived between two starts
            self.send(FORWARDED_AS[self.stop_signal])

    def live(self) -> Iterator[tuple[int, subprocess.Popen]]:
        return ((rank, process) for rank, process in self.processes.items() if rank not in self.ends)

    def send(self, number: signal.Signals) -> None:
        for _, process in self.live():
            process.send_signal(number)

    def handle(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        # Two in a row are one decision, and some programs send two; the third means: now.
        self.num_interrupts += received == signal.SIGINT
        if self.num_interrupts >= INTERRUPTS_TO_KILL:
            self.kill_at = time.monotonic()
            return
        self.stop_signal = self.stop_signal or received
        self.send(FORWARDED_AS[received])

    def poll(self) -> bool:
        """Collect the ranks that have ended; return whether any is still running."""
        if self.stop_signal is not None and not self.is_stop_announced:
            self.is_stop_announced, self.stop_at = True, time.monotonic()
            again = "; press Ctrl-C twice more to end them at once" if self.stop_signal == signal.SIGINT else ""
            logger.info("%s: the ranks finish their step and save%s", self.stop_signal.name, again)
        for rank, process in list(self.live()):
            exit_code = process.poll()
            if exit_code is not None:
                self._collect(rank, process, exit_code)
        if self.nodes is not None:
            self.nodes.poll()
        if self.kill_at is None:
            self._look_further()
        if self.kill_at is not None and time.monotonic() >= self.kill_at:
            self.kill()
        return len(self.ends) < len(self.processes)

    def _look_further(self) -> None:
        """Find reasons to end ranks that run."""
        if self.nodes is not None and self.nodes.has_failure:
            self.kill_at = time.monotonic() + GRACE_SECONDS
        if self.watch is None:
            return
        self.silent = self.watch.look(self._pids())
        is_deaf = self.is_stop_announced and time.monotonic() >= self.stop_at + _SETUP_STOP_SECONDS
        if self.nodes is not None and self.watch.is_meeting():
            self.missing = self.nodes.find_overdue()
        if self.silent is not None or self.missing or (is_deaf and self.watch.is_setting_up()):
            self.kill_at = time.monotonic()
        if (self.silent is not None or self.missing) and self.nodes is not None:
            self.nodes.tell_failure()

    def _pids(self) -> dict[int, int]:
        return {rank: process.pid for rank, process in self.live()}

    def _collect(self, rank: int, process: subprocess.Popen, exit_code: int, *, was_killed_here: bool = False) -> None:
        self.ends[rank] = WorkerEnd(rank=rank, pid=process.pid, exit_code=exit_code, was_killed_here=was_killed_here)
        if exit_code in _ORDERLY or self.kill_at is not None:
            return
        self.kill_at = time.monotonic() + GRACE_SECONDS
        _kill_group(process.pid)  # the processes that the rank started
        if self.nodes is not None:
            self.nodes.tell_failure()
        if exit_code == ExitCode.TIMEOUT and self.watch is not None:
            self.silent = self.watch.find_culprit(self._pids())

    def kill(self) -> None:
        """Kill every remaining rank, with all processes that it started."""
        left = list(self.live())
        for _, process in left:
            _kill_group(process.pid)
        for rank, process in left:
            self._collect(rank, process, _wait_for_death(rank, process), was_killed_here=True)


def run_node(job: NodeJob, watch: SilenceWatch | None = None, nodes: NodeLink | None = None) -> NodeEnd:
    """Run the ranks of this node until all have ended.

    Signals are forwarded according to `FORWARDED_AS`; the ranks decide what they mean. After the first failure, the
    other ranks have `GRACE_SECONDS`. Call this from the main thread.

    Args:
        job: the ranks to start.
        watch: ends them if one is silent for too long; None: nothing does.
        nodes: ends them if a rank of another node fails; None: there is no other node.
    """
    supervisor = _Supervisor(job, watch, nodes)
    with _signals_to(supervisor):
        try:
            supervisor.start()
            while supervisor.poll():
                time.sleep(_POLL_SECONDS)
        finally:
            supervisor.kill()  # none remains, unless this function itself failed
    workers = tuple(supervisor.ends.values())
    return NodeEnd(
        workers=workers, stop_signal=supervisor.stop_signal, silent=supervisor.silent, missing=supervisor.missing
    )


@contextmanager
def _signals_to(supervisor: _Supervisor) -> Iterator[None]:
    previous = {number: signal.getsignal(number) for number in FORWARDED_AS}
    # A signal that the shell had this process ignore (nohup) stays ignored.
    taken = [number for number, handler in previous.items() if handler is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, supervisor.handle)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, previous[number])


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):  # the group is empty
        os.killpg(pid, signal.SIGKILL)


def _wait_for_death(rank: int, process: subprocess.Popen) -> int:
    try:
        return process.wait(timeout=_DEATH_SECONDS)
    except subprocess.TimeoutExpired:
        logger.warning(
            "rank %d (process %d) does not die: it is stuck in the kernel, waiting for a GPU or a file system; the "
            "node may need a restart",
            rank,
            process.pid,
        )
        return -signal.SIGKILL


def find_free_port() -> int:
    """Return a TCP port of this machine that is currently unused."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
