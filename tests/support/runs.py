"""Runs of a tiny model over two small prepared datasets."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_vlm.config import BlendEntry, CheckpointConfig, TrainConfig
from megatron_vlm.data.samples import TokenizerFacts
from megatron_vlm.data.shards.writer import write_dataset
from tests.support.configs import VOCAB_SIZE, tiny_run
from tests.support.samples import make_samples

TOKENIZER = TokenizerFacts(name="tiny", sha256="0" * 64, vocab_size=VOCAB_SIZE, bos_id=1, eos_id=2)


def write_shards(folder: Path) -> Path:
    """Write two datasets, coyo and mmc4, and a tokenizer file."""
    samples = [placed.sample for placed in make_samples(40)]
    write_dataset(folder / "coyo", samples[:25], dataset_name="coyo", tokenizer=TOKENIZER)
    write_dataset(folder / "mmc4", samples[25:], dataset_name="mmc4", tokenizer=TOKENIZER)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    return folder


def shard_run(
    shards: Path, run_dir: Path, *, data: dict[str, Any] | None = None, checkpoint: dict[str, Any] | None = None, **run
) -> TrainConfig:
    """Return a run over `write_shards`; further settings are those of `tiny_run`."""
    training = {"global_batch_size": 2, "train_iters": 6, **run.pop("training", {})}
    config = tiny_run(str(run_dir), **run)
    blend = tuple(BlendEntry(path=str(shards / name), images=1) for name in ("coyo", "mmc4"))
    settings = {"tokenizer": str(shards / "tokenizer.model"), "num_workers": 1, "prefetch_factor": 2, **(data or {})}
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, blend=blend, **settings),
        training=dataclasses.replace(config.training, **training),
        checkpoint=CheckpointConfig(**{"save_interval": 100, "keep_last": 1, **(checkpoint or {})}),
    )


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
