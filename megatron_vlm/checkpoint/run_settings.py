"""Settings that a checkpoint carries in its config.yaml: model sizes, tokenizer and image processing.

Its weights are worth something only with these, so what loads them is held to them.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.checkpoint.folder import find_checkpoint
from megatron_vlm.config import CheckpointError, ConfigError, DataConfig, ModelConfig, TrainConfig, load_section
from megatron_vlm.config.comparison import IN_NEW_STAGE, Difference, MayChange, compare_settings
from megatron_vlm.config.towers import TowerConfig, TowerWrapper
from megatron_vlm.config.yaml_text import read_yaml
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.data.text.tokenizer_files import find_tokenizer
from megatron_vlm.platform.files.run_folder import CONFIG_NAME

logger = logging.getLogger(__name__)


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
        ConfigError: the tokenizer is not found, or is not the run's own.
    """
    checkpoint = find_checkpoint(path)
    recorded = _read(checkpoint)
    # In the run folder, where a conversion puts it, or where the training found it.
    places = [checkpoint.parent.parent, *([Path(recorded.tokenizer)] if recorded.tokenizer else [])]
    own, given = _find_tokenizer(places), None if tokenizer is None else _find_tokenizer([Path(tokenizer)])
    found = own if tokenizer is None else given
    if found is None:
        raise ConfigError(
            f"tokenizer {tokenizer or places[-1]} does not exist",
            where=str(checkpoint),
            fix="name it with --tokenizer",
        )
    if own is not None and given is not None:
        _check_tokenizer(checkpoint, own, given)
    return RunSettings(
        checkpoint=checkpoint,
        model=recorded.model,
        tokenizer=found,
        image_aspect=image_aspect or recorded.image_aspect,
    )


def check_resume(checkpoint: Path, config: TrainConfig) -> None:
    """Check that a run goes on with the model and the image processing of its checkpoint.

    Raises:
        ConfigError: a setting that changes what the weights compute, or see, has another value.
        CheckpointError: the checkpoint has no settings.
    """
    recorded = _read(checkpoint)
    differences = [
        *compare_settings("model", recorded.model, config.model),
        *compare_settings("data.image_aspect", recorded.image_aspect, config.data.image_aspect),
    ]
    for found in differences:
        if found.may_change is MayChange.ALWAYS:
            continue
        other = ", or name the checkpoint in checkpoint.load_weights and train in another run_dir"
        raise ConfigError(
            f"{found.key} is {found.second}, the run was trained with {found.first}",
            where=str(checkpoint),
            fix="restore it" + (other if found.may_change is MayChange.NEW_STAGE else ""),
        )


def check_start(checkpoint: Path, model: ModelConfig) -> None:
    """Check that the weights of a checkpoint mean in a model what they were trained for.

    Image size, tower, projection and other settings that a new stage may learn anew are warned of.

    Raises:
        ConfigError: another setting has another value.
        CheckpointError: the checkpoint has no settings.
    """
    for found in _differences_at_start(_read(checkpoint).model, model):
        what = f"{found.key} is {found.second}, the weights were trained with {found.first}"
        if found.may_change is MayChange.NEVER:
            raise ConfigError(what, where=str(checkpoint), fix="set it to the value of the weights")
        if found.may_change is MayChange.NEW_STAGE:
            logger.warning("%s (%s)", what, checkpoint)


def _differences_at_start(weights: ModelConfig, model: ModelConfig) -> Iterator[Difference]:
    yield from compare_settings("model.language", weights.language, model.language)
    yield from compare_settings("model.projection", weights.projection, model.projection, IN_NEW_STAGE)
    # A wrapper around a tower has no weights.
    (_, theirs), (key, ours) = _innermost(weights.vision), _innermost(model.vision)
    yield from compare_settings(key, theirs, ours, IN_NEW_STAGE)
    # Otherwise the adapter starts anew, or the checkpoint is refused for the tensors that the model lacks.
    if type(weights.adapter) is type(model.adapter):
        yield from compare_settings("model.adapter", weights.adapter, model.adapter)


def _innermost(tower: TowerConfig, key: str = "model.vision") -> tuple[str, TowerConfig]:
    return _innermost(tower.tower, f"{key}.tower") if isinstance(tower, TowerWrapper) else (key, tower)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """What is read of config.yaml."""

    model: ModelConfig
    tokenizer: str | None
    image_aspect: Any


def _read(checkpoint: Path) -> _Recorded:
    path = checkpoint / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError("checkpoint has no config.yaml", where=str(checkpoint), fix="use a complete checkpoint")
    model = load_section(ModelConfig, path, "model")  # first: it says what is wrong with the file
    data = read_yaml(path.read_text())[0].get("data")
    if not isinstance(data, dict):
        data = {}
    default_aspect = DataConfig.__dataclass_fields__["image_aspect"].default
    return _Recorded(model, data.get("tokenizer"), data.get("image_aspect", default_aspect))


def _find_tokenizer(places: Iterable[Path]) -> Path | None:
    for place in places:
        found = find_tokenizer(place) if place.is_dir() else place
        if found is not None and found.is_file():
            return found
    return None


def _check_tokenizer(checkpoint: Path, own: Path, given: Path) -> None:
    """Check that a tokenizer gives the ids that the run was trained with; a damaged one of the run tells nothing."""
    try:
        trained = load_tokenizer(own)
    except ConfigError as error:
        logger.warning("the run's own tokenizer cannot be compared: %s", error)
        return
    found = load_tokenizer(given)
    if found.sha256 != trained.sha256:
        raise ConfigError(
            f"tokenizer {given} (sha256 {found.sha256[:12]}, {found.vocab_size} pieces) is not the run's own "
            f"(sha256 {trained.sha256[:12]}, {trained.vocab_size} pieces)",
            where=str(checkpoint),
            fix=f"omit --tokenizer, or name {own}",
        )
