"""Runs of the three stages, each started from the one before, as far as their records go."""

import json
import shutil
from pathlib import Path

import yaml

from megatron_vlm.checkpoint.manifest import Manifest, checksum_file, list_files, write_manifest
from megatron_vlm.config import ModelConfig, config_to_dict
from tests.support.configs import tiny_run
from tests.support.runs import write_shards

STAGES = ("align", "pretrain", "sft")


def write_stages(folder: Path, run: Path, model: ModelConfig, tokenizer: Path) -> None:
    """Write a run for each stage with the records of 30 iterations and a checkpoint of iteration 25.

    Args:
        folder: where the runs go.
        run: whose checkpoint 0 all of them have.
        model: of that checkpoint.
        tokenizer: of the model.
    """
    shards = write_shards(folder / "shards")
    source = None
    for number, stage in enumerate(STAGES):
        target = folder / stage
        shutil.copytree(run, target)
        checkpoint = target / "checkpoints" / "iter_0000000"
        settings = config_to_dict(tiny_run(str(target), model=model))
        settings |= {"stage": stage, "checkpoint": {"load_weights": source}}
        settings["data"] |= {"tokenizer": str(tokenizer)}
        settings["data"]["blend"] = [
            {"path": str(shards / "coyo"), "epochs": 2.0},
            {"path": "gone/mmc4", "images": 1.0},
        ]
        settings["training"]["freeze"] = ["vision_model", "language_model"] if stage == "align" else []
        (checkpoint / "config.yaml").write_text(yaml.safe_dump(settings))
        progress = {"iteration": 25, "consumed_samples": 100}
        files = {name: checksum_file(checkpoint / name) for name in list_files(checkpoint)}
        write_manifest(checkpoint, Manifest(iteration=25, progress=progress, files=files))
        checkpoint.rename(checkpoint.with_name("iter_0000025"))
        lines = [
            {"iteration": step, "loss": float(step + number), "loss/coyo": 2.0, "tokens": 10, "images": 3}
            for step in range(1, 31)
        ]
        lines.append({"iteration": 20, "validation_loss": 1.25})
        (target / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        source = f"elsewhere/{stage}"  # the runs were moved together since then
