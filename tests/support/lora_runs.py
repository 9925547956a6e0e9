"""Tiny runs with LoRA."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_vlm.config import CheckpointConfig, ModelConfig, TrainConfig
from megatron_vlm.config.adapters.lora import Config
from tests.support.configs import tiny_model, tiny_run

FROZEN = ("vision_model", "language_model")
"""The projection learns as well."""
ADAPTER = Config(rank=4, alpha=8.0, dropout=0.0)
ROWS = [[0, 1], [2, 3], [4, 5], [6, 7]] * 4
NUM_SAMPLES = 8


def lora_model(adapter: Config = ADAPTER, **language: Any) -> ModelConfig:
    """Return the tiny model with LoRA."""
    return dataclasses.replace(tiny_model(**language), adapter=adapter)


def lora_run(
    run_dir: Path | str,
    base: Path | str,
    *,
    model: ModelConfig | None = None,
    parallel: dict[str, Any] | None = None,
    **training: Any,
) -> TrainConfig:
    """Return a run that adapts the weights of `base`."""
    config = tiny_run(
        str(run_dir), model=model or lora_model(), parallel=parallel, training={"freeze": FROZEN, **training}
    )
    return dataclasses.replace(config, checkpoint=CheckpointConfig(load_weights=str(base)))
