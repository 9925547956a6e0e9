"""What `train` hands to the ranks; the ranks themselves are not started here."""

import errno
import logging
import os
import signal
import time
from types import SimpleNamespace

import pytest

from megatron_vlm.cli import train
from megatron_vlm.config import ConfigError, UsageError
from megatron_vlm.platform.launch.launch import NodeEnd, WorkerEnd

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NODEID": "2",
    "SLURM_JOB_NODELIST": "gpu[01-04]",
}
NO_REPLAY = {"replay": None, "replay_from": None}


@pytest.fixture
def launched(project, monkeypatch):
    """Run the verb with stand-ins for ranks and GPUs: `launched(environment, *overrides)` returns the job."""
    monkeypatch.chdir(project.folder)
    logging_state = logging.getLogger().handlers[:], logging.getLogger().level

    def launch(environment=None, *overrides, nproc=None, num_gpus=0, exit_code=0, replay=NO_REPLAY):
        jobs = []

        def run_node(job, watch, nodes):
            jobs.append(job)
            return NodeEnd(workers=(WorkerEnd(rank=0, pid=1, exit_code=exit_code),), stop_signal=None)

        monkeypatch.setattr(train, "run_node", run_node)
        monkeypatch.setattr(train, "count_visible_gpus", lambda environment: num_gpus)
        monkeypatch.setattr(train.os, "environ", {"PATH": "/bin", **(environment or {})})
        args = SimpleNamespace(
            config="train.yaml", overrides=["run_dir=wired", *overrides], nproc_per_node=nproc, **replay
        )
        assert train.run(args) == exit_code
        return jobs[0]

    yield launch
    logging.getLogger().handlers[:], level = logging_state
    logging.getLogger().setLevel(level)
    logging.getLogger("megatron_vlm").setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    ("environment", "nproc", "num_gpus", "num_workers"),
    [
        ({}, None, 0, 1),
        ({}, None, 4, 4),
        ({}, 2, 4, 2),
        ({"SLURM_JOB_ID": "1", "SLURM_GPUS_ON_NODE": "2"}, None, 4, 2),
        ({"SLURM_JOB_ID": "1"}, None, 4, 4),
        ({"SLURM_JOB_ID": "1", "SLURM_GPUS_ON_NODE": "4"}, 1, 4, 1),
    ],
)
def test_number_of_ranks_is_what_was_asked_else_slurms_else_the_gpus_else_one(
    launched, environment, nproc, num_gpus, num_workers
):
    assert launched(environment, nproc=nproc, num_gpus=num_gpus).num_workers == num_workers


def test_single_node_meets_on_itself(launched):
    job = launched()
    assert (job.num_nodes, job.node_rank, job.master_address) == (1, 0, "127.0.0.1")
    assert job.environment["GLOO_SOCKET_IFNAME"] == "lo"


def test_slurm_node_meets_on_the_first_node(launched, caplog):
    job = launched(STEP, nproc=1)
    assert (job.num_nodes, job.node_rank, job.master_address) == (4, 2, "gpu01")
    assert "GLOO_SOCKET_IFNAME" not in job.environment


def test_status_of_an_earlier_start_in_the_same_allocation_does_not_stay(launched, project, monkeypatch):
    allocation = {"SLURM_JOB_ID": "4712"}
    with pytest.raises(ConfigError):
        launched(allocation, "training.global_batch_size=3", nproc=2)
    monkeypatch.setattr(train.os, "getpid", lambda: 1)
    launched(allocation)
    assert '"exit_code": 0' in (project.folder / "wired" / "exit_status.json").read_text()


def test_ranks_overlap_communication_in_order(launched):
    assert launched({"CUDA_DEVICE_MAX_CONNECTIONS": "32"}).environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


def test_threads_of_a_rank_are_its_share_of_the_cores(launched, monkeypatch):
    monkeypatch.setattr(train, "count_cores", lambda: 16)
    job = launched({}, "training.num_threads=null", nproc=4)
    assert (job.environment["OMP_NUM_THREADS"], job.environment["MKL_NUM_THREADS"]) == ("4", "4")


def test_threads_of_the_environment_go_before_the_share(launched):
    job = launched({"OMP_NUM_THREADS": "3"}, "training.num_threads=null")
    assert (job.environment["OMP_NUM_THREADS"], job.environment["MKL_NUM_THREADS"]) == ("3", "3")
    job = launched({"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "2"}, "training.num_threads=null")
    assert job.environment["MKL_NUM_THREADS"] == "2"


def test_threads_of_the_settings_go_before_the_environment(launched):
    assert launched({"OMP_NUM_THREADS": "3"}, "training.num_threads=5").environment["OMP_NUM_THREADS"] == "5"


def test_overrides_reach_the_ranks(launched):
    command = launched({}, "optimizer.lr=1e-4").command
    assert command[3:6] == ("train.yaml", "run_dir=wired", "optimizer.lr=1e-4")


def test_end_of_the_ranks_is_the_end_of_the_command(launched):
    launched(exit_code=75)


def test_status_that_cannot_be_written_does_not_hide_how_the_job_ended(launched, monkeypatch, capsys):
    def full(path, status):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train, "record_exit_status", full)
    launched(exit_code=75)
    assert "could not be written: No space left on device" in capsys.readouterr().err


def test_ranks_that_do_not_fit_the_gpus_are_refused_before_they_start(launched):
    with pytest.raises(ConfigError, match="8 ranks on a node with 4 visible GPUs"):
        launched({}, "training.global_batch_size=8", nproc=8, num_gpus=4)


def test_signal_before_the_ranks_are_there_asks_to_be_requeued(project, launched, monkeypatch):
    def stopped(*args, **settings):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(train, "_check", stopped)
    args = SimpleNamespace(config="train.yaml", overrides=["run_dir=wired"], nproc_per_node=None, **NO_REPLAY)
    assert train.run(args) == 75


def test_a_replay_reaches_the_ranks_and_leaves_the_status_of_the_run(launched, project):
    status = project.folder / "wired" / "exit_status.json"
    launched({}, exit_code=75)
    before = status.read_text()
    job = launched({}, replay={"replay": 3, "replay_from": "elsewhere"})
    assert job.command[-8:-4] == ("--replay", "3", "--replay-from", "elsewhere")
    assert status.read_text() == before


def test_a_checkpoint_without_a_replay_is_a_usage_error(launched):
    with pytest.raises(UsageError, match="--replay-from names a checkpoint for --replay"):
        launched({}, replay={"replay": None, "replay_from": "elsewhere"})
