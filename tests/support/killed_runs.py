"""Kill a run at chosen moments, start it again, and compare it with a run that nobody disturbed."""

import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_vlm.platform.launch.heartbeat import Phase
from tests.support.project import Project

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from watched_job import KeptCheckpoints, Losses, WatchedJob, ledger_of  # noqa: E402

MOMENTS = ("start", "step", "save", "prune", "validation")
VICTIMS = ("rank", "launcher", "loader worker", "all")
KEEP_LAST = 2
SETTINGS = (
    "checkpoint.save_interval=2",
    f"checkpoint.keep_last={KEEP_LAST}",
    "data.validation=[{path: shards}]",
    "training.validation_interval=5",
    "training.validation_iters=2",
    "data.num_workers=1",
    "--nproc-per-node",
    "2",
)


@dataclass(frozen=True)
class Kill:
    """Whom to kill, and when."""

    moment: str
    victim: str
    seed: int
    is_async: bool
    """Whether checkpoints are written while the run goes on."""

    def __str__(self) -> str:
        return f"{self.victim} killed in {self.moment}, seed {self.seed}{', asynchronous saves' * self.is_async}"


def kills_of(seeds: Sequence[int]) -> list[Kill]:
    """Return a kill for each seed: every moment with every victim, then all of them again with the other saves."""
    pairs = [(moment, victim) for moment in MOMENTS for victim in VICTIMS]
    return [Kill(*pairs[seed % len(pairs)], seed, seed % 2 == seed // len(pairs) % 2) for seed in seeds]


class KilledRun:
    """A run in a folder of the project, its killed starts, and what they have recorded."""

    def __init__(self, project: Project, name: str, iterations: int) -> None:
        self.project, self.run_dir = project, project.folder / name
        self.log = project.folder / f"{name}.log"
        # Sockets are made in it, and the path of a socket has at most 107 characters.
        self.temporary = Path(tempfile.mkdtemp(prefix="killed-"))
        self.losses, self.jobs = Losses(), []
        self._settings = (f"training.train_iters={iterations}", *SETTINGS)

    def start(self, *settings: str) -> WatchedJob:
        variables = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        arguments = (str(self.project.config), *self._settings, *settings)
        job = WatchedJob(arguments, self.run_dir, self.temporary, self.log, variables, self.project.folder)
        self.jobs.append(job)
        return job

    def kill(self, kill: Kill) -> None:
        """Start, kill, and check what is left.

        Raises:
            AssertionError: the job goes on, a process survives, or a checkpoint is harmed.
        """
        before, rng = KeptCheckpoints.of(self.run_dir), random.Random(kill.seed)
        job = self.start(f"checkpoint.async_save={str(kill.is_async).lower()}")
        try:
            assert job.wait_for(_MOMENTS[kill.moment](job, rng, before)), f"{kill}: the run ended before"
            job.members()
            for process in _victims(job, kill.victim, rng):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            code = job.wait_for_end(60)
        finally:
            job.kill_all()
        assert code not in (0, None), f"{kill}: exit code {code}"
        assert not job.survivors(), kill
        assert not before.harm(KEEP_LAST), kill
        self.losses.read(self.run_dir)

    def finish(self) -> None:
        """Let the run come to its end."""
        job = self.start()
        try:
            assert job.wait_for_end(600) == 0, self.log.read_text()[-3000:]
        finally:
            job.kill_all()
        self.losses.read(self.run_dir)

    def assert_equal(self, reference: "KilledRun") -> None:
        """Compare losses, samples and leftovers with those of a run that was not disturbed."""
        assert not self.losses.contradictions
        assert self.losses.values == reference.losses.values
        assert ledger_of(self.run_dir) == ledger_of(reference.run_dir)
        for run in (self, reference):
            assert not list(run.temporary.iterdir())
            run.temporary.rmdir()
        assert not [name for job in self.jobs for name in job.shared_memory()]
        assert not list((self.run_dir / "checkpoints").glob("*.megatron_vlm-*"))


Moment = Callable[[], bool]


def _after(condition: Moment, seconds: float) -> Moment:
    """Return a condition that holds so many seconds after another has first held."""
    since: list[float] = []

    def holds() -> bool:
        if not since and condition():
            since.append(time.monotonic())
        return bool(since) and time.monotonic() >= since[0] + seconds

    return holds


def _in_start(job: WatchedJob, rng: random.Random, before: KeptCheckpoints) -> Moment:
    where = rng.choice(["launcher", "meeting", "setup"])
    if where == "launcher":
        return _after(lambda: True, rng.uniform(0.0, 1.0))
    phase = Phase.MEETING if where == "meeting" else Phase.SETUP
    return _after(lambda: job.is_in(phase), rng.uniform(0.0, 0.5))


def _in_step(job: WatchedJob, rng: random.Random, before: KeptCheckpoints) -> Moment:
    return _after(lambda: job.is_in(Phase.STEP), rng.uniform(0.0, 0.4))


def _in_save(job: WatchedJob, rng: random.Random, before: KeptCheckpoints) -> Moment:
    condition = job.is_saving
    if before.hashes:  # what a killed save left is moved away at the start
        return _after(lambda: job.is_in(Phase.STEP, Phase.SAVE) and condition(), rng.uniform(0.0, 0.05))
    return _after(condition, rng.uniform(0.0, 0.05))


def _in_prune(job: WatchedJob, rng: random.Random, before: KeptCheckpoints) -> Moment:
    """As soon as another checkpoint is there, older ones go."""

    def is_new() -> bool:
        folders = sum(1 for _ in (job.run_dir / "checkpoints").glob("iter_*[0-9]"))
        return job.is_in(Phase.STEP, Phase.SAVE) and folders > KEEP_LAST

    return _after(is_new, rng.uniform(0.0, 0.003))


def _in_validation(job: WatchedJob, rng: random.Random, before: KeptCheckpoints) -> Moment:
    steps: list[int] = []

    def is_validating() -> bool:
        beat = job.beat()
        if beat is None or beat.phase < Phase.FIRST_STEP:
            return False
        steps.append(beat.iteration)
        return beat.phase == Phase.FIRST_STEP and beat.iteration > steps[0]

    return _after(is_validating, rng.uniform(0.0, 0.2))


_MOMENTS = {
    "start": _in_start,
    "step": _in_step,
    "save": _in_save,
    "prune": _in_prune,
    "validation": _in_validation,
}


def _victims(job: WatchedJob, victim: str, rng: random.Random) -> list[psutil.Process]:
    """Return the processes to kill, all loader workers of one rank; the launcher where the others are not there yet."""
    launcher = [psutil.Process(job.process.pid)]
    if victim == "all":
        return job.members()
    if victim == "loader worker" and (workers := job.loader_workers()):
        return rng.choice(workers)
    return [rng.choice((job.ranks() if victim != "launcher" else []) or launcher)]
