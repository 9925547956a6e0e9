"""A tiny model and run for tests: real shapes, two layers."""

from dataclasses import replace
from typing import Any

from megatron_vlm.config import (
    BlendEntry,
    DataConfig,
    LanguageConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TrainingConfig,
)
from megatron_vlm.config.modules import find_module
from megatron_vlm.config.projectors import make_projector
from megatron_vlm.config.towers.clip import Config as ClipConfig
from megatron_vlm.config.towers.s2 import Config as ScaledConfig

VOCAB_SIZE = 120
SEQ_LENGTH = 192


def tiny_model(**language: Any) -> ModelConfig:
    """Return a model of 4 decoder layers with grouped queries and a tower of 3 layers, 16 tokens an image."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2,
    }
    return ModelConfig(
        language=LanguageConfig(**{**settings, **language}),
        vision=ClipConfig(
            image_size=32, patch_size=8, num_layers=3, hidden_size=36, ffn_hidden_size=72, num_attention_heads=3
        ),
        projection=make_projector("mlp2x_gelu"),
        backend="torch",
    )


def tiny_model_with_tower(type: str, **settings: Any) -> ModelConfig:
    """Return the tiny model with a tower of another type and of about the same size.

    Args:
        type: of the tower; `s2` stands for a clip tower at two scales.
        settings: of the tower, or of the one that it wraps.
    """
    model = tiny_model()
    if type == "s2":
        inner = tiny_model_with_tower("clip", **settings).vision
        return replace(model, vision=ScaledConfig(scales=(32, 64), tower=inner))
    sizes = ("image_size", "patch_size", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    shared = {name: getattr(model.vision, name) for name in sizes}
    config = find_module("megatron_vlm.config.towers", type, "tower").Config
    return replace(model, vision=config(**{**shared, **settings}))


def tiny_run(
    run_dir: str = "unused",
    *,
    parallel: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    model: ModelConfig | None = None,
) -> TrainConfig:
    """Return a run over `tiny_model` in fp32; the given settings replace the defaults."""
    return TrainConfig(
        stage="pretrain",
        run_dir=run_dir,
        model=model or tiny_model(),
        data=DataConfig(tokenizer="unused", blend=(BlendEntry(path="unused"),), seq_length=SEQ_LENGTH),
        optimizer=OptimizerConfig(
            **{"lr": 1e-3, "lr_decay_style": "constant", "weight_decay": 0.01, **(optimizer or {})}
        ),
        training=TrainingConfig(
            **{"global_batch_size": 4, "train_iters": 5, "precision": "fp32", "recompute": "none", **(training or {})}
        ),
        parallel=ParallelConfig(**(parallel or {})),
    )
