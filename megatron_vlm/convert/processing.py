"""How a Hugging Face folder prepares images, as settings of our tower; position embeddings of another image size."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_vlm.checkpoint.lazy_tensors import LazyTensor
from megatron_vlm.config import ModelConfig, UsageError
from megatron_vlm.config.towers import TowerConfig, TowerWrapper
from megatron_vlm.config.vision_transformer import VisionTransformerConfig
from megatron_vlm.convert.family import find_tower_family
from megatron_vlm.convert.folder import read_settings
from megatron_vlm.models.layers.position_embeddings import PositionEmbeddings

_IMAGE_PROCESSOR, _PROCESSOR = "preprocessor_config.json", "processor_config.json"
_POSITIONS = "model.vision_model.position_embeddings.weight"


def with_processing(vision: Any, folder: Path) -> Any:
    """Return the tower with mean and standard deviation of the colours and the image size of a folder, if it has them.

    The image size is that of config.json if the table of positions depends on it.
    """
    settings = _read_image_processor(folder)
    found: dict[str, Any] = {}
    for name in ("image_mean", "image_std"):
        if name in settings and settings.get("do_normalize", True):
            found[name] = tuple(settings[name])
    if isinstance(vision, TowerWrapper):  # the size is that of the whole image, not that of what the tower sees
        return replace(vision, tower=replace(vision.tower, **found))  # type: ignore[type-var]
    crop = settings.get("crop_size")
    if isinstance(crop, dict) and "image_size" in find_tower_family(vision.type).FREE:
        found["image_size"] = crop["height"]
    return replace(vision, **found)


def _read_image_processor(folder: Path) -> dict[str, Any]:
    """Return the settings of the image processor: transformers 4 gives it a file, 5 a section of the processor's."""
    if (folder / _IMAGE_PROCESSOR).is_file():
        return read_settings(folder / _IMAGE_PROCESSOR)
    if (folder / _PROCESSOR).is_file():
        section: dict[str, Any] = read_settings(folder / _PROCESSOR).get("image_processor", {})
        return section
    return {}


def at_image_size(model: ModelConfig, image_size: int | None) -> ModelConfig:
    """Return the model of a folder for images of another size.

    Args:
        model: as the folder has it.
        image_size: side of the image [pixels]; None: as it is.

    Raises:
        UsageError: the model sees images at several sizes.
    """
    if image_size is None:
        return model
    if isinstance(model.vision, TowerWrapper):
        raise UsageError(f"a tower of type {model.vision.type} has sizes of its own", fix="omit --image-size")
    return replace(model, vision=replace(model.vision, image_size=image_size))  # type: ignore[type-var]


def resize_positions(
    tensors: Mapping[str, LazyTensor], stored: TowerConfig, wanted: TowerConfig
) -> dict[str, LazyTensor]:
    """Return the tensors with position embeddings for another image size, interpolated as `load_weights` does it.

    Args:
        tensors: of the tower or the whole model, by our key.
        stored: the tower of the folder.
        wanted: the tower to import, which differs in nothing but the image size.
    """
    assert isinstance(stored, VisionTransformerConfig)
    assert isinstance(wanted, VisionTransformerConfig)
    if stored.position_grid == wanted.position_grid:
        return dict(tensors)
    table, special = tensors[_POSITIONS], wanted.architecture
    module = PositionEmbeddings(
        wanted.position_grid,
        int(special.class_token),
        wanted.hidden_size,
        table.dtype,
        antialias=special.antialias_positions,
    )

    def make(layer: int | None) -> Tensor:
        return module.resize(table.make(layer))

    resized = LazyTensor(shape=tuple(module.weight.shape), dtype=table.dtype, is_stacked=False, make=make)
    return {**tensors, _POSITIONS: resized}
