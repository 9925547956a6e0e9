"""A SLURM of small scripts: `sbatch`, `srun` and `scontrol` that tests put first on the PATH.

Jobs are files in one folder; nodes are all this machine. It starts what a script starts, gives it the variables that
SLURM sets, hands signals to the step as SLURM does, and starts a job again that `scontrol requeue` has named.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import megatron_vlm

ROOT = Path(megatron_vlm.__file__).parents[1]
SCRIPTS = ROOT / "examples" / "slurm"

_SBATCH = """\
import json, os, sys
from pathlib import Path
jobs = Path(os.environ["STAND_IN"]) / "jobs"
arguments = sys.argv[1:]
number = sum(argument.startswith("--") for argument in arguments)
assert all(argument.startswith("--") for argument in arguments[:number]), "options go before the script"
job = len(list(jobs.iterdir())) + 1
options = dict(argument[2:].partition("=")[::2] for argument in arguments[:number])
facts = {"options": options, "command": arguments[number:], "folder": os.getcwd()}
(jobs / f"{job}.json").write_text(json.dumps(facts))
print(f"{job};here" if "parsable" in options else f"Submitted batch job {job}")
"""
_SRUN = """\
import os, signal, subprocess, sys, time
from pathlib import Path
folder, arguments = Path(os.environ["STAND_IN"]), sys.argv[1:]
number = next(i for i, argument in enumerate(arguments) if not argument.startswith("--"))
with (folder / "srun.log").open("a") as log:
    log.write("".join(f"{option}\\n" for option in arguments[:number]))
nodes = int(os.environ.get("SLURM_NNODES", "1"))
steps = folder / f"steps-{os.environ['SLURM_JOB_ID']}"
step = len(steps.read_text().split()) if steps.exists() else 0
tasks = []
def hand_on(number, frame):
    for task in tasks:
        task.send_signal(number)
for one in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(one, hand_on)
variables = {"SLURM_STEP_ID": str(step), "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_STEP_NUM_TASKS": str(nodes)}
variables["SLURM_JOB_NODELIST"] = ",".join(["localhost", "other"][:nodes])
for node in range(nodes):
    environment = {**os.environ, **variables, "SLURM_NODEID": str(node), "GLOO_SOCKET_IFNAME": "lo"}
    tasks.append(subprocess.Popen(arguments[number:], env=environment))
with steps.open("a") as file:
    file.write(f"{os.getpid()}\\n")
while any(task.poll() is None for task in tasks):
    if "--kill-on-bad-exit=1" in arguments and any(task.returncode for task in tasks) and "deadline" not in globals():
        deadline = time.monotonic() + 20  # KillWait
        hand_on(signal.SIGTERM, None)
    if "deadline" in globals() and time.monotonic() > deadline:
        hand_on(signal.SIGKILL, None)
    time.sleep(0.05)
sys.exit(max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks))
"""
_SCONTROL = """\
import os, sys
from pathlib import Path
with (Path(os.environ["STAND_IN"]) / "scontrol.log").open("a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
"""


@dataclass(kw_only=True)
class Job:
    """A submitted job."""

    number: int
    options: dict[str, str]
    command: list[str]
    folder: str
    exit_codes: list[int] = field(default_factory=list)
    """Of each start."""

    @property
    def after(self) -> int | None:
        """The job that this one waits for."""
        kind, _, number = self.options.get("dependency", "").partition(":")
        assert kind in ("", "afterok")
        return int(number) if number else None


class Cluster:
    """The stand-ins, and what they have been asked.

    Args:
        folder: for the scripts and their notes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        (folder / "jobs").mkdir()
        for name, code in (("sbatch", _SBATCH), ("srun", _SRUN), ("scontrol", _SCONTROL)):
            self.add_command(name, f"#!{sys.executable}\n{code}")
        self.add_command("megatron-vlm", f'#!/bin/sh\nexec "{sys.executable}" -m megatron_vlm "$@"\n')

    def add_command(self, name: str, text: str) -> None:
        """Put a script on the PATH of the jobs."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def environment(self, **variables: str) -> dict[str, str]:
        """Return the environment of a job's script."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "CONTAINER_"))}
        paths = {"PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "STAND_IN": str(self.folder)}
        return {**kept, **paths, "CUDA_VISIBLE_DEVICES": "", "SLURM_CPUS_PER_TASK": "3", **variables}

    def srun_options(self) -> list[str]:
        """Return the options of all steps so far."""
        return (self.folder / "srun.log").read_text().splitlines()

    def requeued(self) -> list[str]:
        """Return the jobs that `scontrol requeue` was called with."""
        log = self.folder / "scontrol.log"
        calls = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        assert all(call[0] == "requeue" for call in calls)
        return [job for _, job in calls]

    def submitted(self) -> list[Job]:
        """Return the jobs that `sbatch` was given."""
        paths = sorted((self.folder / "jobs").iterdir(), key=lambda path: int(path.stem))
        facts: list[dict[str, Any]] = [json.loads(path.read_text()) for path in paths]
        return [Job(number=int(path.stem), **fact) for path, fact in zip(paths, facts, strict=True)]

    def step(self, job: Job) -> int:
        """Return the process of the newest step of a job that runs, once it is there."""
        path, deadline = self.folder / f"steps-{job.number}", time.monotonic() + 30
        while not path.exists() or len(path.read_text().split()) <= len(job.exit_codes):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return int(path.read_text().split()[-1])

    def run(self, job: Job, disturb: Callable[[int], None] | None = None, timeout: float = 600) -> int:
        """Start a job's script, disturb the process of its step, and return the exit code of the script."""
        variables = {
            "SLURM_JOB_ID": str(job.number),
            "SLURM_JOB_NAME": job.options.get("job-name", "job"),
            "SLURM_NNODES": job.options.get("nodes", "1"),
            "SLURM_RESTART_COUNT": str(len(job.exit_codes)),
            "SLURM_SUBMIT_DIR": job.folder,
        }
        process = subprocess.Popen(["bash", *job.command], cwd=job.folder, env=self.environment(**variables))
        try:
            if disturb is not None:
                disturb(self.step(job))
            job.exit_codes.append(process.wait(timeout=timeout))
        finally:
            if process.poll() is None:
                os.kill(self.step(job), signal.SIGTERM)
                process.kill()
        return job.exit_codes[-1]
