"""The scripts of examples/slurm, run by bash against stand-ins for SLURM's commands."""

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.data.shards.manifest import load_manifest
from tests.support.project import make_project
from tests.support.sentence_piece import train_sentence_piece
from tests.support.slurm_cluster import SCRIPTS, Cluster
from tests.support.training_jobs import wait_for_iteration

ENDS_WITH = "#!/bin/sh\nexit {}\n"


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path / "slurm")


def run_task(tmp_path: Path, cluster: Cluster, task: int, arguments: list[str], script: str, **variables: str) -> int:
    task_of_slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job"}
    task_of_slurm |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2"}
    environment = cluster.environment(**{**task_of_slurm, **variables})
    return subprocess.run(["bash", SCRIPTS / script, *arguments], env=environment, check=False).returncode


def test_the_tasks_of_an_array_prepare_parts_that_merge_joins(tmp_path, cluster):
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"text": f"the cat {number}"}) + "\n")
    tokenizer = train_sentence_piece(tmp_path)
    prepare = ["prepare", "text", "--input", "0.jsonl", "1.jsonl", "--output", "shards", "--tokenizer", str(tokenizer)]
    for task in (1, 2):
        assert run_task(tmp_path, cluster, task, prepare, "prepare.sbatch") == 0
    assert not cluster.requeued()
    parts = sorted(str(path) for path in tmp_path.glob("shards.part-*"))
    assert main(["data", "merge", str(tmp_path / "shards"), *parts]) == 0
    assert load_manifest(tmp_path / "shards").counts.samples == 2


@pytest.mark.parametrize(("script", "job"), [("prepare.sbatch", "7_2"), ("pretrain.sbatch", "7")])
@pytest.mark.parametrize("code", [0, 65, 75])
def test_a_job_that_was_stopped_in_good_order_is_requeued_and_no_wrong_one(tmp_path, cluster, code, script, job):
    cluster.add_command("megatron-vlm", ENDS_WITH.format(code))
    assert run_task(tmp_path, cluster, 2, ["prepare"], script) == code
    assert cluster.requeued() == ([job] if code == 75 else [])


@pytest.mark.parametrize("code", [1, 71, 137])
def test_training_that_a_fault_ended_is_requeued_so_often_and_no_more(tmp_path, cluster, code):
    cluster.add_command("megatron-vlm", ENDS_WITH.format(code))
    for _ in range(3):
        assert run_task(tmp_path, cluster, 1, [], "pretrain.sbatch", MAX_FAULTS="2") == code
    assert cluster.requeued() == ["7", "7"]
    assert (tmp_path / "job-7.faults").read_text().count(f"ended with exit code {code}\n") == 3


def test_faults_are_forgotten_with_the_end_of_the_stage(tmp_path, cluster):
    (tmp_path / "job-7.faults").write_text("start 0\n")
    cluster.add_command("megatron-vlm", ENDS_WITH.format(0))
    assert run_task(tmp_path, cluster, 1, [], "pretrain.sbatch") == 0
    assert not (tmp_path / "job-7.faults").exists()


@pytest.mark.parametrize("script", ["prepare.sbatch", "pretrain.sbatch"])
def test_the_command_gets_all_cores_of_the_job(tmp_path, cluster, script):
    cluster.add_command("megatron-vlm", ENDS_WITH.format(0))
    assert run_task(tmp_path, cluster, 1, ["prepare"], script) == 0
    assert "--cpus-per-task=3" in cluster.srun_options()
    assert not any("container" in option for option in cluster.srun_options())


def test_training_in_a_container_mounts_the_folder_of_the_job_and_others(tmp_path, cluster):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("exit 9")  # of the host
    cluster.add_command("megatron-vlm", '#!/bin/sh\nprintf "%s\\n" "$@" > arguments\n')
    container = {"CONTAINER_IMAGE": "/images/a b.sqsh", "CONTAINER_MOUNTS": "/data:/data"}
    assert run_task(tmp_path, cluster, 1, ["a.yaml", "optimizer.lr=1"], "pretrain.sbatch", **container) == 0
    options = cluster.srun_options()
    assert "--container-image=/images/a b.sqsh" in options
    assert f"--container-mounts={tmp_path}:{tmp_path},/data:/data" in options
    assert f"--container-workdir={tmp_path}" in options
    assert (tmp_path / "arguments").read_text().split() == ["train", "a.yaml", "optimizer.lr=1"]


def submit_stages(folder: Path, cluster: Cluster, *arguments: str) -> None:
    command = ["bash", str(SCRIPTS / "stages.sh"), *arguments]
    subprocess.run(command, cwd=folder, env=cluster.environment(), check=True)


def test_each_stage_waits_for_the_one_before(tmp_path, cluster):
    submit_stages(tmp_path, cluster, "configs/small", "--nodes=2")
    jobs = cluster.submitted()
    assert [job.after for job in jobs] == [None, 1, 2]
    assert [job.command[1] for job in jobs] == [f"configs/small/{stage}.yaml" for stage in ("align", "pretrain", "sft")]
    assert [job.options["nodes"] for job in jobs] == ["2", "2", "2"]
    assert [job.options.get("kill-on-invalid-dep") for job in jobs] == [None, "yes", "yes"]


def test_the_stages_of_the_example_are_there(tmp_path, cluster):
    submit_stages(SCRIPTS.parents[1], cluster)
    assert all((SCRIPTS.parents[1] / job.command[1]).is_file() for job in cluster.submitted())


@pytest.fixture
def stages(tmp_path):
    """A tiny project with a config for each stage."""
    (tmp_path / "project").mkdir()
    project = make_project(tmp_path / "project")
    (project.folder / "tiny").mkdir()
    before = None
    for stage, iterations in (("align", 20), ("pretrain", 20), ("sft", 4)):
        settings = {
            "base": "../train.yaml",
            "stage": stage,
            "run_dir": f"runs/{stage}",
            "training": {"train_iters": iterations, "freeze": ["language_model"] if stage == "align" else []},
            "checkpoint": {"save_interval": 3, "load_weights": before},
        }
        (project.folder / "tiny" / f"{stage}.yaml").write_text(json.dumps(settings))
        before = f"runs/{stage}"
    return project


def losses(run_dir: Path) -> list[tuple[int, str]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(record["iteration"], record["loss_hex"]) for record in records]


@pytest.mark.faults
@pytest.mark.distributed
def test_stages_on_two_nodes_come_through_a_preemption_and_a_lost_node_as_if_undisturbed(stages, cluster):
    submit_stages(stages.folder, cluster, "tiny", "--nodes=2")

    def preempt(step: int) -> None:
        wait_for_iteration(stages, "runs/align", 2)
        os.kill(step, signal.SIGUSR1)

    def lose_a_node(step: int) -> None:
        wait_for_iteration(stages, "runs/pretrain", 4)
        launcher = psutil.Process(step).children()[1]
        for process in (launcher, *launcher.children(recursive=True)):
            process.kill()

    align, pretrain, sft = cluster.submitted()
    assert cluster.run(align, preempt) == 75
    assert cluster.requeued() == ["1"]
    assert cluster.run(align) == 0
    assert cluster.run(pretrain, lose_a_node) == 137
    assert cluster.requeued() == ["1", "2"]
    assert cluster.run(pretrain) == 0
    assert cluster.run(sft) == 0
    assert cluster.requeued() == ["1", "2"]
    runs = (stages.folder / "runs").rename(stages.folder / "disturbed")
    for stage in ("align", "pretrain", "sft"):
        done = stages.run("train", f"tiny/{stage}.yaml", "--nproc-per-node", "2")
        assert done.returncode == 0, done.stderr
        assert losses(stages.folder / "runs" / stage) == losses(runs / stage)
