"""Typed settings: frozen dataclasses, YAML loading, and the arithmetic that follows from them."""

from megatron_vlm.config.adapters import AdapterConfig
from megatron_vlm.config.blend import BlendEntry
from megatron_vlm.config.data import DataConfig
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
from megatron_vlm.config.language import LanguageConfig
from megatron_vlm.config.layout import Layout, derive_layout, position_multiple
from megatron_vlm.config.loading import config_to_dict, load_config, load_preset, load_section, save_config
from megatron_vlm.config.model import IGNORE_INDEX, PART_NAMES, ModelConfig
from megatron_vlm.config.projectors import ProjectorConfig
from megatron_vlm.config.towers import TowerConfig
from megatron_vlm.config.train import (
    CheckpointConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TrainingConfig,
)

__all__ = [
    "IGNORE_INDEX",
    "PART_NAMES",
    "AdapterConfig",
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
    "ProjectorConfig",
    "StorageError",
    "TowerConfig",
    "TrainConfig",
    "TrainingConfig",
    "UsageError",
    "UserError",
    "config_to_dict",
    "derive_layout",
    "load_config",
    "load_preset",
    "load_section",
    "position_multiple",
    "save_config",
]
