"""Real jobs that are stopped, killed and frozen: how they end, how fast, and what they say."""

import signal

import psutil
import pytest

from tests.support.project import make_project
from tests.support.training_jobs import LONG, errors_of, exit_status, started_jobs, wait_for_iteration

pytestmark = [pytest.mark.faults, pytest.mark.distributed]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tiny project; every test uses a run_dir of its own."""
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def start(project):
    """Start `megatron-vlm train` and return the process; it is ended after the test."""
    with started_jobs(project) as start_process:
        yield start_process


def family(process):
    """Return the launcher and everything that it started."""
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_signal_to_every_process_twice_loses_no_step(project, start, number):
    name = f"all_{number.name}"
    process = start(name, *LONG, "checkpoint.save_interval=100000", "--nproc-per-node", "2")
    wait_for_iteration(project, name, 2)
    for _ in range(2):
        for member in family(process):
            member.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert not errors_of(errors)
    assert process.returncode == (130 if number == signal.SIGINT else 75)
    done = exit_status(project, name)["iteration"]
    assert (project.folder / name / "checkpoints" / f"iter_{done:07d}" / "manifest.json").exists()


def test_signal_to_one_rank_stops_the_job_like_one_to_the_launcher(project, start):
    process = start("one", *LONG, "checkpoint.save_interval=100000", "--nproc-per-node", "2")
    wait_for_iteration(project, "one", 2)
    psutil.Process(process.pid).children()[1].send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 75
