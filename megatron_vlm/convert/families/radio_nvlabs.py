"""The RADIO family as published by NVIDIA: settings of the config.json of its RADIOModel; the table is that of `radio`.

The file has no `model_type`, so the family is found by its architecture. Its sizes are in the name of a model of timm.
"""

import re
from typing import Any

from megatron_vlm.config import CheckpointError
from megatron_vlm.config.towers.radio import Config
from megatron_vlm.convert.families import radio
from megatron_vlm.convert.families.radio import constants, renames, rules, unused
from megatron_vlm.convert.vision_transformer import require_settings

__all__ = ["constants", "renames", "rules", "unused"]
PART = "vision"
MODEL_TYPES = ("RADIOModel",)
_SIZES = {"base": (12, 768, 12), "large": (24, 1024, 16), "huge": (32, 1280, 16)}
"""Layers, width, heads."""
_MODEL = re.compile(rf"vit_({'|'.join(_SIZES)})_patch(\d+)_\d+")


def config_to_hf(vision: Config) -> dict[str, Any]:
    """Return config.json of transformers' RadioModel; raises like that of `radio`."""
    return radio.config_to_hf(vision)


def config_from_hf(settings: dict[str, Any], *, where: str, **chosen: Any) -> Config:
    """Return our settings.

    Args:
        settings: config.json of a RADIOModel.
        where: the file, for messages.
        chosen: fields that override the file.

    Raises:
        CheckpointError: our tower does not support something in the settings.
    """
    arguments = settings.get("args") or {}
    model = _MODEL.fullmatch(str(arguments.get("model")))
    if model is None:
        raise CheckpointError(
            f"the tower is a {arguments.get('model')}", where=where, fix=f"use a ViT that is {', '.join(_SIZES)}"
        )
    # Features would be normalised, and patches would see a window only.
    require_settings(settings, {"feature_normalizer_config": None, "vitdet_window_size": None}, where=where)
    num_layers, hidden, heads = _SIZES[model[1]]
    patch = settings.get("patch_size") or int(model[2])
    preferred = settings.get("preferred_resolution") or [chosen.get("image_size", 768)]
    found: dict[str, Any] = {
        "image_size": preferred[0],
        "patch_size": patch,
        "position_grid": round((arguments.get("cpe_max_size") or settings.get("max_resolution") or 2048) / patch),
        "num_layers": num_layers,
        "hidden_size": hidden,
        "ffn_hidden_size": 4 * hidden,
        "num_attention_heads": heads,
        **_tokens(arguments),
    }
    return Config(**{**found, **chosen})


def _tokens(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the tokens before the patches: one for each teacher, then registers up to a multiple."""
    teachers = arguments.get("teachers") or [{}]
    per_teacher = bool(arguments.get("cls_token_per_teacher"))
    number = len({teacher.get("name") for teacher in teachers}) if per_teacher else 1
    multiple = arguments.get("register_multiple") or 0
    registers = arguments.get("cpe_num_registers") or (multiple - number % multiple if multiple else 0)
    summary = [index for index, teacher in enumerate(teachers[:number]) if teacher.get("use_summary", True)]
    return {
        "num_class_tokens": number,
        "num_registers": registers,
        "summary_tokens": tuple(summary if per_teacher else [0]),
    }
