"""Real training jobs, which tests watch and disturb."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from tests.support.project import Project

LONG = ("training.train_iters=400", "optimizer.lr=1e-5")


@contextmanager
def started_jobs(project: Project) -> Iterator[Callable[..., subprocess.Popen]]:
    """Yield a function that starts `megatron-vlm train` and returns the process; all are ended afterwards."""
    started = []

    def start(run_dir: str, *arguments: str, **variables: str) -> subprocess.Popen:
        process = subprocess.Popen(
            project.command("train", "train.yaml", f"run_dir={run_dir}", *arguments),
            cwd=project.folder,
            env=project.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_hear_interrupts,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell has its background jobs ignore


def patched(project: Project, code: str) -> dict[str, str]:
    """Return the variable that has every process of a job run `code` when it starts."""
    folder = project.folder / f"patch_{len(list(project.folder.iterdir()))}"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def two_node_step(nodes: str = "localhost,other") -> dict[str, str]:
    """Return the environment of a SLURM step on two nodes, without the number of the node; this machine plays both."""
    return {
        "SLURM_JOB_ID": str(time.time_ns() % 10**6),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_NODELIST": nodes,
        "GLOO_SOCKET_IFNAME": "lo",
    }


def wait_for_iteration(project: Project, run_dir: str, iteration: int, timeout: float = 90) -> None:
    """Return once the metrics of so many iterations are written."""
    path, deadline = project.folder / run_dir / "metrics.jsonl", time.monotonic() + timeout
    while not path.exists() or len(path.read_text().splitlines()) < iteration:
        assert time.monotonic() < deadline, "training did not get that far"
        time.sleep(0.05)


def ranks_of(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """Return the ranks that a launcher has started."""
    return {int(child.environ()["RANK"]): child for child in psutil.Process(process.pid).children()}


def errors_of(text: str) -> list[str]:
    """Return the lines that end a failed command."""
    return [line for line in text.splitlines() if "megatron-vlm: error:" in line]


def exit_status(project: Project, run_dir: str) -> dict[str, Any]:
    """Return what the job left for scripts."""
    return json.loads((project.folder / run_dir / "exit_status.json").read_text())
