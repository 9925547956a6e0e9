"""The settings of VILA's config.json that its two layouts share: those of the tower's features and of the projection.

Source: https://github.com/NVlabs/VILA, llava/model/configuration_llava.py.
"""

from dataclasses import replace
from typing import Any, cast

from megatron_vlm.config import CheckpointError, ModelConfig
from megatron_vlm.config.towers import TowerConfig, TowerWrapper, innermost
from megatron_vlm.config.towers.s2 import Config as ScaledConfig
from megatron_vlm.config.vision_transformer import VisionTransformerConfig
from megatron_vlm.convert.family import Family, Serving, find_family, find_tower_family
from megatron_vlm.convert.files.processor import image_processor_config, select_strategy
from megatron_vlm.convert.projector import VilaProjector, vila_projector
from megatron_vlm.data.loading.pixels import Aspect

_POST_NORM = "mm_vision_post_norm"
"""Whether the features pass the last norm of the tower. A key of ours: those of VILA's own towers never do."""


def tower_family(vision: TowerConfig) -> Family:
    """Return the family whose names and settings VILA has for a tower, or for the one that is seen in several scales.

    Raises:
        CheckpointError: the tower has no conversion, or is wrapped in a way that VILA does not know.
    """
    if isinstance(vision, TowerWrapper) and not isinstance(vision, ScaledConfig):
        raise _misfit(vision, "VILA knows no towers within others except s2")
    if isinstance(vision, ScaledConfig) and vision.constant_grid.num_prefix_tokens:
        raise _misfit(vision, "VILA's s2 keeps no class token (model.vision.tower.drop_class_token)")
    return find_family(find_tower_family(innermost(vision).type).VILA_TYPE, "vision", "model.vision")


def model_projector(model: ModelConfig) -> VilaProjector:
    """Return the projection of a model as VILA has it.

    Raises:
        CheckpointError: VILA cannot hold it.
    """
    sizes = {"input_size": model.vision.feature_size, "output_size": model.language.hidden_size}
    return vila_projector(model.projection, **sizes)


def _misfit(vision: TowerConfig, reason: str) -> CheckpointError:
    return CheckpointError(
        f"a tower of type {vision.type} does not fit VILA's formats: {reason}", where="model.vision", fix="use another"
    )


def tower_settings(vision: TowerConfig, feature_layer: int) -> dict[str, Any]:
    """Return the keys of config.json about the features of a tower.

    Args:
        vision: the tower.
        feature_layer: hidden state of the exported tower that the projection gets.
    """
    inner = cast(VisionTransformerConfig, innermost(vision))
    scales = list(vision.scales) if isinstance(vision, ScaledConfig) else []
    return {
        "mm_hidden_size": vision.feature_size,
        "mm_vision_select_layer": feature_layer,
        "mm_vision_select_feature": "patch" if select_strategy(inner) == "default" else "cls_patch",
        **({_POST_NORM: True} if inner.architecture.post_norm else {}),
        "s2": bool(scales),
        "s2_scales": ",".join(map(str, scales)),
        "s2_max_split_size": inner.image_size,
    }


def read_tower(settings: dict[str, Any], family: Family, tower: dict[str, Any], where: str) -> TowerConfig:
    """Return our settings of the tower of a model.

    Args:
        settings: config.json of the model.
        family: of the tower.
        tower: config.json of the tower.
        where: the file, for messages.

    Raises:
        CheckpointError: our model does not support something in the settings.
    """
    vision = family.config_from_hf(tower, where=where, feature_layer=settings.get("mm_vision_select_layer", -2))
    if family.rules is not tower_family(vision).rules:
        raise CheckpointError(
            f"the tower has the layout of {tower.get('model_type')}, which VILA's folders do not have",
            where=where,
            fix=f"use one of {find_tower_family(vision.type).VILA_TYPE}",
        )
    features = {
        "drop_class_token": settings.get("mm_vision_select_feature", "patch") == "patch",
        "post_norm": bool(settings.get(_POST_NORM, False)),
    }
    vision = replace(vision, **{name: value for name, value in features.items() if hasattr(vision, name)})
    if not settings.get("s2"):
        return cast(TowerConfig, vision)
    if "image_size" in find_tower_family(vision.type).FREE:
        vision = replace(vision, image_size=settings["s2_max_split_size"])
    if settings["s2_max_split_size"] != vision.image_size:
        raise CheckpointError(
            f"s2_max_split_size={settings['s2_max_split_size']}, but the tower sees {vision.image_size} pixels",
            where=where,
            fix="use a model with tiles of the size of the tower",
        )
    return ScaledConfig(scales=tuple(int(size) for size in str(settings["s2_scales"]).split(",")), tower=vision)


def serving_settings(serving: Serving) -> dict[str, Any]:
    """Return the keys of config.json about images in prompts."""
    return {
        "image_aspect_ratio": serving.image_aspect,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }


def tokenizer_settings(serving: Serving) -> dict[str, Any]:
    """Return the keys of the language model's settings about its tokenizer."""
    return {
        "bos_token_id": serving.tokenizer.bos_id,
        "eos_token_id": serving.tokenizer.eos_id,
        "tokenizer_model_max_length": serving.model.language.max_position_embeddings,
        "tokenizer_padding_side": "right",
        "torch_dtype": str(serving.dtype).removeprefix("torch."),
    }


def processor_settings(serving: Serving) -> dict[str, Any]:
    """Return preprocessor_config.json of the tower.

    VILA's code pads an image to a square itself, before this processor, which then only has to make it smaller or
    larger; the processors of all towers read a size that has both sides.
    """
    aspect: Aspect = "square" if serving.image_aspect == "square" else "resize"
    settings = image_processor_config(serving.model.vision, aspect)
    del settings["processor_class"]  # there is none for a whole VILA
    return settings
