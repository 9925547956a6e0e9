"""Typed settings: dataclasses, YAML loading and the arithmetic that follows from them."""

from megatron_vlm.config.data import BlendEntry, DataConfig
from megatron_vlm.config.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ExitCode,
    NumericError,
    StorageError,
    UsageError,
    UserError,
)
from megatron_vlm.config.layout import Layout, derive_layout
from megatron_vlm.config.loading import config_to_dict, load_config, load_section, save_config
from megatron_vlm.config.model import IGNORE_INDEX, LanguageConfig, ModelConfig, ProjectionConfig, VisionConfig
from megatron_vlm.config.train import (
    PART_NAMES,
    CheckpointConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TrainingConfig,
)

__all__ = [
    "IGNORE_INDEX",
    "PART_NAMES",
    "BlendEntry",
    "CheckpointConfig",
    "CheckpointError",
    "ConfigError",
    "DataConfig",
    "DataError",
    "ExitCode",
    "LanguageConfig",
    "Layout",
    "ModelConfig",
    "NumericError",
    "OptimizerConfig",
    "ParallelConfig",
    "ProjectionConfig",
    "StorageError",
    "TrainConfig",
    "TrainingConfig",
    "UsageError",
    "UserError",
    "VisionConfig",
    "config_to_dict",
    "derive_layout",
    "load_config",
    "load_section",
    "save_config",
]
