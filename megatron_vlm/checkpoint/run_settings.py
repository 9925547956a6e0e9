"""Settings that a checkpoint carries in its config.yaml: model sizes, tokenizer and image processing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_vlm.checkpoint.folder import find_checkpoint
from megatron_vlm.config import CheckpointError, ConfigError, DataConfig, ModelConfig, load_section
from megatron_vlm.data.text.tokenizer_files import find_tokenizer
from megatron_vlm.platform.files.run_folder import CONFIG_NAME


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """A checkpoint and the settings needed to use it."""

    checkpoint: Path
    model: ModelConfig
    tokenizer: Path
    """Model file of the tokenizer, known to exist; its settings are beside it."""
    image_aspect: Any
    """As in `DataConfig`."""


def read_run_settings(
    path: str | Path, *, tokenizer: str | None = None, image_aspect: str | None = None
) -> RunSettings:
    """Return a checkpoint, or the newest complete one of a run folder, with its settings.

    Args:
        path: run folder or checkpoint.
        tokenizer: overrides the run's own.
        image_aspect: overrides the run's own.

    Raises:
        CheckpointError: there is no checkpoint, or it has no readable settings.
        ConfigError: the tokenizer is not found.
    """
    checkpoint = find_checkpoint(path)
    config_path = checkpoint / CONFIG_NAME
    if not config_path.is_file():
        raise CheckpointError("checkpoint has no config.yaml", where=str(checkpoint), fix="use a complete checkpoint")
    model = load_section(ModelConfig, config_path, "model")
    data = yaml.safe_load(config_path.read_text()).get("data") or {}
    default_aspect = DataConfig.__dataclass_fields__["image_aspect"].default
    return RunSettings(
        checkpoint=checkpoint,
        model=model,
        tokenizer=_find_tokenizer(checkpoint, tokenizer, data.get("tokenizer")),
        image_aspect=image_aspect or data.get("image_aspect", default_aspect),
    )


def _find_tokenizer(checkpoint: Path, given: str | None, recorded: str | None) -> Path:
    if given is not None:
        candidates = [Path(given)]
    else:
        # In the run folder, where a conversion puts it, or where the training found it.
        candidates = [checkpoint.parent.parent, *([Path(recorded)] if recorded else [])]
    for candidate in candidates:
        found = find_tokenizer(candidate) if candidate.is_dir() else candidate
        if found is not None and found.is_file():
            return found
    raise ConfigError(
        f"tokenizer {candidates[-1]} does not exist", where=str(checkpoint), fix="name it with --tokenizer"
    )
