"""A folder with everything that `megatron-vlm train` needs, and the real command to run in it."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_vlm.config import BlendEntry, save_config
from megatron_vlm.data.shards.writer import write_dataset
from megatron_vlm.data.text.tokenizer import load_tokenizer
from tests.support.configs import tiny_model, tiny_run
from tests.support.samples import make_samples
from tests.support.sentence_piece import NUM_PIECES, train_sentence_piece

_NOT_HANDED_ON = ("SLURM_", "OMP_", "MKL_", "CUDA_VISIBLE", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")


@dataclass(frozen=True)
class Project:
    """Paths of a tiny project."""

    folder: Path
    config: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "megatron_vlm", *arguments]

    def environment(self, **variables: str) -> dict[str, str]:
        """Return this process's environment without GPUs and what a cluster or another test may have left in it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_HANDED_ON)}
        return {**kept, "CUDA_VISIBLE_DEVICES": "", **variables}

    def run(self, *arguments: str, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `megatron-vlm` with the given arguments in the folder of the project."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


def make_project(folder: Path, num_samples: int = 64) -> Project:
    """Write tokenizer, shards and a configuration of a tiny run into `folder`."""
    tokenizer = load_tokenizer(train_sentence_piece(folder))
    samples = [placed.sample for placed in make_samples(num_samples)]
    write_dataset(folder / "shards", samples, dataset_name="tiny", tokenizer=tokenizer.facts)
    run = tiny_run("run", model=tiny_model(vocab_size=NUM_PIECES), training={"train_iters": 4, "num_threads": 1})
    data = replace(run.data, tokenizer="tokenizer.model", blend=(BlendEntry(path="shards"),), num_workers=1)
    save_config(replace(run, data=data), folder / "train.yaml")
    return Project(folder=folder, config=folder / "train.yaml")
