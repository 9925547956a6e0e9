"""The scripts of examples/slurm, run by bash with the variables that SLURM sets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_vlm
from megatron_vlm.cli.main import main
from megatron_vlm.data.shards.manifest import load_manifest
from tests.support.sentence_piece import train_sentence_piece

ROOT = Path(megatron_vlm.__file__).parents[1]
SCRIPTS = ROOT / "examples" / "slurm"


@pytest.fixture
def command(tmp_path) -> Path:
    """A folder for PATH with the console script of this very checkout, and what the script calls of SLURM."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "megatron-vlm": f'exec "{sys.executable}" -m megatron_vlm "$@"',
        "srun": f'while [ "${{1#--}}" != "$1" ]; do echo "$1" >> {tmp_path}/srun.log; shift; done; exec "$@"',
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol.log',
    }
    for name, line in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    return folder


def run_task(tmp_path: Path, command: Path, task: int, arguments: list[str], script: str = "prepare.sbatch") -> int:
    task_of_slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "3", "SLURM_JOB_ID": "7"}
    task_of_slurm |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2"}
    paths = {"PATH": f"{command}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", SCRIPTS / script, *arguments], env=os.environ | paths | task_of_slurm).returncode


def test_the_tasks_of_an_array_prepare_parts_that_merge_joins(tmp_path, command):
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"text": f"the cat {number}"}) + "\n")
    tokenizer = train_sentence_piece(tmp_path)
    prepare = ["prepare", "text", "--input", "0.jsonl", "1.jsonl", "--output", "shards", "--tokenizer", str(tokenizer)]
    for task in (1, 2):
        assert run_task(tmp_path, command, task, prepare) == 0
    assert not (tmp_path / "scontrol.log").exists()
    parts = sorted(str(path) for path in tmp_path.glob("shards.part-*"))
    assert main(["data", "merge", str(tmp_path / "shards"), *parts]) == 0
    assert load_manifest(tmp_path / "shards").counts.samples == 2


@pytest.mark.parametrize(("script", "job"), [("prepare.sbatch", "7_2"), ("pretrain.sbatch", "7")])
@pytest.mark.parametrize("code", [0, 65, 75])
def test_a_job_that_was_stopped_in_good_order_is_requeued_and_no_other(tmp_path, command, code, script, job):
    (command / "megatron-vlm").write_text(f"#!/bin/sh\nexit {code}\n")
    assert run_task(tmp_path, command, 2, ["prepare"], script) == code
    log = tmp_path / "scontrol.log"
    assert (log.read_text() if log.exists() else "") == (f"requeue {job}\n" if code == 75 else "")


@pytest.mark.parametrize("script", ["prepare.sbatch", "pretrain.sbatch"])
def test_the_command_gets_all_cores_of_the_job(tmp_path, command, script):
    (command / "megatron-vlm").write_text("#!/bin/sh\nexit 0\n")
    assert run_task(tmp_path, command, 1, ["prepare"], script) == 0
    assert "--cpus-per-task=3" in (tmp_path / "srun.log").read_text().splitlines()
