"""Real jobs that are stopped, killed and frozen: how they end, how fast, and what they say."""

import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.support.training_jobs import (
    LONG,
    errors_of,
    exit_status,
    patched,
    ranks_of,
    two_node_step,
    wait_for_iteration,
)

pytestmark = [pytest.mark.faults, pytest.mark.distributed]


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


HANG = """
import os, time
if os.environ.get("RANK") == "1":
    from megatron_vlm.training.batch_counts import BatchCounts
    add = BatchCounts.add
    calls = []
    def hang_in_the_third_step(self, batch):
        calls.append(batch)
        while len(calls) == 5:  # two in a step
            time.sleep(0.1)
        add(self, batch)
    BatchCounts.add = hang_in_the_third_step
"""
LIMIT = 10.0
LIMITS = (f"supervision.step_minutes={LIMIT / 60}", "checkpoint.save_interval=100000")


def ends(process, *, within, code):
    """Wait for the end of a job and return its one line."""
    began = time.monotonic()
    _, errors = process.communicate(timeout=within + 60)
    assert time.monotonic() - began <= within, errors
    (line,) = errors_of(errors)
    assert process.returncode == code, errors
    return line, errors


def test_frozen_rank_is_named_within_its_limit_and_five_seconds(project, start):
    process = start("frozen", *LONG, *LIMITS, "--nproc-per-node", "2")
    wait_for_iteration(project, "frozen", 3)
    rank = ranks_of(process)[1]
    rank.suspend()
    line, _ = ends(process, within=LIMIT + 5, code=71)
    assert f"rank 1 (process {rank.pid}) was silent for 1" in line
    assert "it is stopped" in line
    assert exit_status(project, "frozen")["exit_code"] == 71


def test_frozen_rank_is_named_where_the_collectives_of_others_give_up_first(project, start):
    limits = ("supervision.step_minutes=5", "parallel.distributed_timeout_minutes=0.5")
    process = start("waited", *LONG, *limits, "--nproc-per-node", "2")
    wait_for_iteration(project, "waited", 3)
    rank = ranks_of(process)[1]
    rank.suspend()
    line, _ = ends(process, within=30 + 10, code=71)
    assert "a collective took longer than parallel.distributed_timeout_minutes allows" in line
    assert f"wait for rank 1 (process {rank.pid}), in a step after iteration" in line
    assert "it is stopped" in line


def test_rank_that_hangs_is_named_with_its_stack(project, start):
    process = start("hangs", *LONG, *LIMITS, "--nproc-per-node", "2", **patched(project, HANG))
    wait_for_iteration(project, "hangs", 2)
    line, errors = ends(process, within=LIMIT + 5, code=71)
    assert "rank 1 (" in line
    assert "it hangs in sitecustomize.py:" in line
    assert "in hang_in_the_third_step" in errors


SLOW_DISK = """
import os, time
if os.environ.get("RANK") == "1":
    from megatron_vlm.checkpoint.item_files import ChecksummedStream
    write = ChecksummedStream.write
    calls = []
    def write_slowly(self, data):
        calls.append(1)
        while len(calls) > {hangs_after}:
            time.sleep(0.1)
        if len(calls) < 80:
            time.sleep(0.5)
        return write(self, data)
    ChecksummedStream.write = write_slowly
"""
SLOW_SAVE = (f"supervision.save_minutes={LIMIT / 60}", "training.train_iters=1", "--nproc-per-node", "2")


def test_save_may_take_longer_than_its_limit_as_long_as_it_gets_on(project, start):
    process = start("slow", *SLOW_SAVE, **patched(project, SLOW_DISK.format(hangs_after=10**9)))
    wait_for_iteration(project, "slow", 1)
    began = time.monotonic()
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert time.monotonic() - began > 1.5 * LIMIT


def test_rank_whose_save_hangs_is_named(project, start):
    process = start("stuck", *SLOW_SAVE, **patched(project, SLOW_DISK.format(hangs_after=8)))
    wait_for_iteration(project, "stuck", 1)
    line, _ = ends(process, within=LIMIT + 10, code=71)
    assert "rank 1 (" in line
    assert "in a save after iteration 1, longer than supervision.save_minutes allows: it hangs in " in line


def test_frozen_loader_worker_of_the_only_rank_is_named(project, start):
    process = start("loader", *LONG, *LIMITS, "--nproc-per-node", "1")
    wait_for_iteration(project, "loader", 3)
    worker = next(child for child in ranks_of(process)[0].children() if "worker" in " ".join(child.cmdline()))
    worker.suspend()
    line, _ = ends(process, within=LIMIT + 7, code=71)  # it had batches ready
    assert f"process {worker.pid}, which it started, is stopped" in line


def two_nodes(start, name, *arguments):
    step = two_node_step()
    return [start(name, *LONG, *arguments, "--nproc-per-node", "1", SLURM_NODEID=str(node), **step) for node in (0, 1)]


@pytest.mark.parametrize("dead", [0, 1])
def test_dead_rank_ends_its_node_and_the_other_one_and_is_named_once(project, start, dead):
    nodes = two_nodes(start, f"dead_{dead}")
    wait_for_iteration(project, f"dead_{dead}", 3)
    rank = ranks_of(nodes[dead])[dead]
    killed = time.monotonic()
    rank.kill()
    errors = [node.communicate(timeout=60)[1] for node in nodes]
    assert time.monotonic() - killed < 10
    (line,) = [line for text in errors for line in errors_of(text)]
    assert f"rank {dead} (process {rank.pid}) was killed by SIGKILL" in line
    assert [node.returncode for node in nodes] == [1, 1]
    assert exit_status(project, f"dead_{dead}")["rank"] == dead


def shared_memory(members):
    """Return what these processes have left; torch writes their ids into the names."""
    ids = {str(member.pid) for member in members}
    return [path.name for path in Path("/dev/shm").iterdir() if ids & set(path.name.split("_"))]


def test_run_leaves_nothing_in_the_temporary_folder_or_in_shared_memory(project, start, tmp_path):
    process = start("clean", "data.num_workers=2", "--nproc-per-node", "2", TMPDIR=str(tmp_path))
    wait_for_iteration(project, "clean", 1)
    members = family(process)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert not list(tmp_path.iterdir())
    assert not shared_memory(members)


def test_run_with_a_temporary_folder_too_deep_for_sockets_trains(project, start, tmp_path):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    process = start("deep", "data.num_workers=1", "training.train_iters=2", TMPDIR=str(deep))
    process.communicate(timeout=120)
    assert process.returncode == 0


def test_no_process_and_no_file_survives_a_kill_of_launcher_and_ranks_and_the_next_run(project, start, tmp_path):
    arguments = ("data.num_workers=2", "checkpoint.async_save=true", "checkpoint.save_interval=1")
    process = start("killed", *LONG, *arguments, "--nproc-per-node", "2", TMPDIR=str(tmp_path))
    wait_for_iteration(project, "killed", 3)
    everything = family(process)
    for member in (everything[0], *ranks_of(process).values()):
        member.kill()
    process.communicate(timeout=20)
    assert not psutil.wait_procs(everything, timeout=5)[1]
    again = start("after", *arguments, "--nproc-per-node", "2", TMPDIR=str(tmp_path))
    again.communicate(timeout=120)
    assert again.returncode == 0
    assert not list(tmp_path.iterdir())
    assert not shared_memory(everything)


def test_lost_node_is_named(project, start):
    nodes = two_nodes(start, "lost")
    wait_for_iteration(project, "lost", 3)
    members = family(nodes[1])
    for member in members:
        member.kill()
    line, _ = ends(nodes[0], within=12, code=1)
    assert "node 1 was lost" in line
    assert not psutil.wait_procs(members[1:], timeout=5)[1]


def test_frozen_rank_of_another_node_is_named(project, start):
    nodes = two_nodes(start, "far", *LIMITS)
    wait_for_iteration(project, "far", 3)
    rank = ranks_of(nodes[1])[1]
    rank.suspend()
    errors = [node.communicate(timeout=60)[1] for node in nodes]
    (line,) = [line for text in errors for line in errors_of(text)]
    assert f"rank 1 (process {rank.pid}) was silent" in line
    assert [node.returncode for node in nodes] == [71, 71]


def test_stop_while_a_node_is_missing_ends_the_job_soon(project, start):
    (first, second) = two_nodes(start, "missing")
    second.kill()
    time.sleep(15)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 75


def test_node_that_does_not_come_up_is_named(project, start):
    (first, second) = two_nodes(start, "absent", "supervision.meeting_minutes=0.3")
    second.kill()
    line, errors = ends(first, within=0.3 * 60 + 15, code=71)
    assert "node 1 did not come up within supervision.meeting_minutes" in line
    assert "node 1 of 2 not up after" in errors
    assert exit_status(project, "absent")["exit_code"] == 71
