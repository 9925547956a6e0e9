"""Train while faults are injected, and compare with a run that nobody disturbed.

    python tools/soak.py train.yaml --output runs/soak --minutes 30 --every 40 training.train_iters=1000000

Every 40 s on average something happens to a run of 2 ranks on this machine: a rank, the launcher, a loader worker or
all of them are killed (kill -9); a rank is stopped (SIGSTOP); the job is asked to stop (SIGTERM); the ranks find the
disk full; everything is killed and a bit of the newest checkpoint is flipped. The same command is started again at
once. When the time is over, the run goes on to an iteration a little later and must end with exit code 0; then a second
run goes there without a fault. The losses of all iterations, those that were lost and repeated included, and the ids of
the consumed samples must be the same to the bit.

Printed are, for each kind of fault, the seconds until the job had ended (found), from there to the first new step
(restarted), and the iterations that were done again (lost); and the goodput: the time in steps that count, as a part
of the whole. The exit code is 0 if everything held.

The run must have iterations enough, and keep at least two checkpoints.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from watched_job import KeptCheckpoints, Losses, WatchedJob, ledger_of

from megatron_vlm.checkpoint.folder import checkpoint_path, list_iterations
from megatron_vlm.config import ExitCode
from megatron_vlm.platform.files.metrics import read_metrics
from megatron_vlm.platform.launch.heartbeat import Phase

_TORCH_CACHE = "torchinductor_"
"""A folder in the temporary one that torch uses again and again."""
_FULL_DISK_SECONDS = 30.0
_MIN_RUN_SECONDS = 3.0
"""From the first step to the next fault: with slow starts, faults come more rarely than asked for."""
_PATIENCE_SECONDS = 90.0
_FEW_ITERATIONS = 10
"""After the last fault, so that the run ends with steps."""
KINDS = ("kill", "stop", "term", "full disk", "flip")


@dataclass(kw_only=True)
class Fault:
    """One fault, and what became of it."""

    kind: str
    victim: str
    iteration: int
    """Steps done before."""
    found: float = 0.0
    """Until the job had ended; of a full disk that the job outlived, until there was room again [s]."""
    exit_code: int = 0
    restarted: float | None = None
    """From the end of the job to its first new step; None: it did not end, or the time was over [s]."""
    lost: int = 0
    """Iterations that had to be done again."""


@dataclass
class Soak:
    """A run that is disturbed."""

    args: argparse.Namespace
    rng: random.Random
    losses: Losses = field(default_factory=Losses)
    faults: list[Fault] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """What a run should not do."""
    due: list[str] = field(default_factory=list)
    """Kinds of faults that come next."""
    job: WatchedJob | None = None
    """The newest."""

    @property
    def run_dir(self) -> Path:
        """The folder of the disturbed run."""
        return self.args.output / "disturbed"

    def start(self, name: str = "disturbed", *settings: str) -> WatchedJob:
        """Start a run, or start it again."""
        temporary = self.args.output / f"{name}.tmp"
        temporary.mkdir(exist_ok=True)
        limits = [f"supervision.{key}_minutes={self.args.silence / 60}" for key in ("first_step", "step", "save")]
        options = ("--nproc-per-node", str(self.args.ranks))
        arguments = (str(self.args.config), *limits, *self.args.settings, *settings, *options)
        self.job = WatchedJob(arguments, self.args.output / name, temporary, self.args.output / f"{name}.log", {})
        return self.job

    def disturb_for(self, seconds: float) -> None:
        """Start, disturb and start again until the time is over; then ask the run to stop."""
        ends_at = time.monotonic() + seconds
        job = self.start()
        while True:
            due = time.monotonic() + self.rng.expovariate(1 / self.args.every)
            self._watch_restart(job)
            due = max(due, time.monotonic() + _MIN_RUN_SECONDS)
            if due >= ends_at:
                break
            if not self._sleep(job, due):
                self.wrong.append(f"the job ended without a fault, exit code {job.process.returncode}: see its log")
                return
            self._inject(job)
            if not job.is_running():
                job = self.start()
        self._sleep(job, ends_at)
        job.process.send_signal(signal.SIGTERM)
        job.wait_for_end(self.args.silence + _PATIENCE_SECONDS)

    def finish(self) -> int:
        """Let the run come to its end; return the iteration."""
        last = self.losses.read(self.run_dir) + _FEW_ITERATIONS
        self._run_to("disturbed", last)
        self.losses.read(self.run_dir)
        return last

    def compare(self, last: int) -> None:
        """Run to the same iteration without a fault, and compare."""
        self._run_to("reference", last)
        reference = Losses()
        reference.read(self.args.output / "reference")
        self.wrong += self.losses.contradictions
        if reference.values != self.losses.values:
            differ = [one for one in reference.values if reference.values[one] != self.losses.values.get(one)]
            self.wrong.append(f"{len(differ)} losses differ from the undisturbed run, first at iteration {differ[:1]}")
        if ledger_of(self.run_dir) != ledger_of(self.args.output / "reference"):
            self.wrong.append("the samples differ from those of the undisturbed run")

    def _run_to(self, name: str, iteration: int) -> None:
        job = self.start(name, f"training.exit_iteration={iteration}")
        code = job.wait_for_end(self.args.minutes * 60 + 600)
        if code != ExitCode.DONE:
            self.wrong.append(f"the {name} run ended with exit code {code}; see {name}.log")
        self.wrong += [f"{one} of the {name} run survived it" for one in job.survivors()]
        files = (self.args.output / f"{name}.tmp").iterdir()
        left = [*(one for one in files if not one.name.startswith(_TORCH_CACHE)), *job.shared_memory()]
        self.wrong += [f"the {name} run left {one}" for one in left]

    def _sleep(self, job: WatchedJob, until: float) -> bool:
        """Wait for the next fault; return whether the job still runs."""
        while time.monotonic() < until:
            if not job.is_running():
                return False
            time.sleep(0.05)
        return job.is_running()

    def _watch_restart(self, job: WatchedJob) -> None:
        """Measure how long it takes to the first new step, and what was lost."""
        fault = self.faults[-1] if self.faults else None
        if fault is None or fault.restarted is not None or fault.exit_code == ExitCode.DONE:
            job.wait_for(lambda: job.is_in(Phase.STEP, Phase.SAVE))
            return
        began, resumed = time.monotonic(), []

        def is_stepping() -> bool:
            beat = job.beat()
            if beat is None or beat.phase < Phase.FIRST_STEP:
                return False
            resumed.append(beat.iteration)
            return beat.iteration > resumed[0] or beat.phase > Phase.FIRST_STEP

        if job.wait_for(is_stepping):
            fault.restarted, fault.lost = time.monotonic() - began, max(0, fault.iteration - resumed[0])
            print(f"  restarted in {fault.restarted:.1f} s, {fault.lost} iterations lost", flush=True)
            if fault.kind == "term" and fault.lost:
                self.wrong.append(f"term: {fault.lost} iterations lost")

    def _inject(self, job: WatchedJob) -> None:
        kind = self._next_kind()
        before, keep = KeptCheckpoints.of(self.run_dir), 1 + (kind != "flip")
        job.members()
        fault = Fault(kind=kind, victim="", iteration=job.beat().iteration if job.beat() else 0)
        began = time.monotonic()
        fault.victim = _FAULTS[kind](job, self.rng)
        if kind == "full disk" and job.is_running():
            fault.found, fault.exit_code = time.monotonic() - began, ExitCode.DONE
        else:
            code = job.wait_for_end(self.args.silence + _PATIENCE_SECONDS)
            fault.found = time.monotonic() - began
            fault.exit_code = -signal.SIGKILL if code is None else code
            self._judge(job, fault, code)
        if kind != "flip":
            self.wrong += [f"{kind}: {one}" for one in before.harm(keep)]
        self.losses.read(self.run_dir)
        self.faults.append(fault)
        print(
            f"{kind} ({fault.victim}) at iteration {fault.iteration}: "
            f"exit code {fault.exit_code} after {fault.found:.1f} s",
            flush=True,
        )

    def _next_kind(self) -> str:
        """Return each kind once in random order, then again; a flip needs an older checkpoint to fall back to."""
        if not self.due:
            self.due = self.rng.sample(KINDS, len(KINDS))
        can_flip = len(list_iterations(self.run_dir)) > 1
        kind = next((kind for kind in self.due if kind != "flip" or can_flip), "kill")
        if kind in self.due:
            self.due.remove(kind)
        return kind

    def _judge(self, job: WatchedJob, fault: Fault, code: int | None) -> None:
        if code is None:
            self.wrong.append(f"{fault.kind} ({fault.victim}): the job did not end")
        expected = {"stop": (ExitCode.TIMEOUT,), "term": (ExitCode.REQUEUE,), "full disk": (ExitCode.STORAGE,)}
        if code is not None and (code == 0 or code not in expected.get(fault.kind, (code,))):
            self.wrong.append(f"{fault.kind} ({fault.victim}): exit code {code}")
        if fault.kind == "stop" and fault.found > self.args.silence + 5:
            self.wrong.append(f"stop: found after {fault.found:.1f} s, more than {self.args.silence:.0f} + 5")
        self.wrong += [f"{fault.kind}: {one} survived" for one in job.survivors()]


def _kill(job: WatchedJob, rng: random.Random) -> str:
    groups = {
        "rank": [[rank] for rank in job.ranks()],
        "loader worker": job.loader_workers(),
        "launcher": [[psutil.Process(job.process.pid)]],
        "all": [job.members()],
    }
    victim = rng.choice([name for name, members in groups.items() if members])
    for member in rng.choice(groups[victim]):
        with suppress(psutil.NoSuchProcess):
            member.kill()
    return victim


def _stop(job: WatchedJob, rng: random.Random) -> str:
    number, rank = rng.choice(list(enumerate(job.ranks())))
    rank.suspend()
    return f"rank {number}"


def _term(job: WatchedJob, rng: random.Random) -> str:
    job.process.send_signal(signal.SIGTERM)
    return "launcher"


def _fill_disk(job: WatchedJob, rng: random.Random) -> str:
    """Let the ranks write to no file, as on a disk without room, until the job ends or for some seconds."""
    limits = {rank.pid: resource.prlimit(rank.pid, resource.RLIMIT_FSIZE) for rank in job.ranks()}
    for pid, (_, hard) in limits.items():
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    deadline = time.monotonic() + _FULL_DISK_SECONDS
    while job.is_running() and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid, limit in limits.items():
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
    return "all ranks"


def _flip(job: WatchedJob, rng: random.Random) -> str:
    job.kill_all()
    newest = checkpoint_path(job.run_dir, list_iterations(job.run_dir)[0])
    payload = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(payload.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    payload.write_bytes(content)
    return f"{payload.parent.name}/{payload.name}"


_FAULTS: dict[str, Callable[[WatchedJob, random.Random], str]] = {
    "kill": _kill,
    "stop": _stop,
    "term": _term,
    "full disk": _fill_disk,
    "flip": _flip,
}


def describe(faults: Sequence[Fault], useful: float, wall: float) -> list[str]:
    """Return the lines of the report.

    Args:
        faults: what happened.
        useful: time in steps that count [s].
        wall: time of the disturbed run, from its first start to the end of its last [s].
    """
    lines = [f"{'fault':<10} number  found s (max)  restarted s (max)  iterations lost (max)"]
    for kind in KINDS:
        of_kind = [fault for fault in faults if fault.kind == kind]
        ended = [fault for fault in of_kind if fault.exit_code != ExitCode.DONE]
        columns = (
            [fault.found for fault in of_kind],
            [fault.restarted for fault in ended if fault.restarted is not None],
            [fault.lost for fault in ended if fault.restarted is not None],
        )
        texts = [f"{statistics.median(one):.1f} ({max(one):.1f})" if one else "-" for one in columns]
        lines.append(f"{kind:<10} {len(of_kind):>6}  {texts[0]:>13}  {texts[1]:>17}  {texts[2]:>21}")
    lines.append(
        f"{len(faults)} faults in {wall:.0f} s; goodput {useful / wall:.1%} ({useful:.0f} s in steps that count)"
    )
    return lines


def useful_seconds(run_dir: Path) -> float:
    """Return the time in the steps that count, each once."""
    return sum(record.get("seconds", 0.0) for record in read_metrics(run_dir))


def main() -> int:
    """Parse the command line, disturb, compare, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--output", type=Path, required=True, help="new folder for both runs, their logs and the report"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of faults")
    parser.add_argument("--every", type=float, default=40.0, help="seconds between faults, on average")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--silence", type=float, default=15.0, help="seconds that a rank may be silent in a step or save"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_intermixed_args()
    args.output = args.output.absolute()
    if args.output.exists():
        sys.exit(f"soak.py: error: the output folder exists ({args.output}); fix: remove it or name another")
    args.output.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the run, too
    soak, began = Soak(args, random.Random(args.seed)), time.monotonic()
    try:
        soak.disturb_for(60 * args.minutes)
        last = soak.finish()
        wall = time.monotonic() - began
        lines = describe(soak.faults, useful_seconds(soak.run_dir), wall)
        soak.compare(last)
    finally:
        if soak.job is not None:
            soak.job.kill_all()
    facts = {"faults": [asdict(fault) for fault in soak.faults], "wall": wall, "iterations": last, "wrong": soak.wrong}
    (args.output / "soak.json").write_text(json.dumps(facts, indent=2))
    print("\n".join([*lines, *(f"WRONG: {one}" for one in soak.wrong)]))
    print(f"{last} iterations, losses and samples {'differ' if soak.wrong else 'equal to the bit'}")
    for name in ("disturbed.tmp", "reference.tmp"):
        shutil.rmtree(args.output / name, ignore_errors=True)
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
