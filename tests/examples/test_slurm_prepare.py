"""examples/slurm/prepare.sbatch, run by bash with the variables that SLURM sets for the tasks of an array."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_vlm
from megatron_vlm.cli.main import main
from megatron_vlm.data.manifest import load_manifest
from tests.support.sentence_piece import train_sentence_piece

SCRIPT = Path(megatron_vlm.__file__).parents[1] / "examples" / "slurm" / "prepare.sbatch"


@pytest.fixture
def command(tmp_path) -> Path:
    """A folder for PATH with the console script of this very checkout."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "megatron-vlm").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m megatron_vlm "$@"\n')
    (folder / "megatron-vlm").chmod(0o755)
    return folder


def test_the_tasks_of_an_array_prepare_parts_that_merge_joins(tmp_path, command):
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"text": f"the cat {number}"}) + "\n")
    tokenizer = train_sentence_piece(tmp_path)
    prepare = ["prepare", "text", "--input", "0.jsonl", "1.jsonl", "--output", "shards", "--tokenizer", str(tokenizer)]
    for task in (1, 2):
        task_of_slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "1"}
        task_of_slurm |= {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2"}
        paths = {"PATH": f"{command}:{os.environ['PATH']}", "PYTHONPATH": str(SCRIPT.parents[2])}
        subprocess.run(["bash", str(SCRIPT), *prepare], env=os.environ | paths | task_of_slurm, check=True)
    parts = sorted(str(path) for path in tmp_path.glob("shards.part-*"))
    assert main(["data", "merge", str(tmp_path / "shards"), *parts]) == 0
    assert load_manifest(tmp_path / "shards").counts.samples == 2
