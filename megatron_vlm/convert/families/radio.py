"""The RADIO family as in transformers 5: tensor names of RadioModel's files and settings of its config.json.

The files have the names of NVIDIA's own code: transformers renames them when it reads and writes.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.config import CheckpointError
from megatron_vlm.config.towers.radio import Config
from megatron_vlm.convert import vision_transformer
from megatron_vlm.convert.rules import Reshaped, Rule
from megatron_vlm.convert.vision_transformer import (
    Names,
    read_activation,
    require_settings,
    unused_layers,
    vision_rules,
)

PART = "vision"
MODEL_TYPES = ("radio", "RadioModel")
# The table of positions does not depend on the image size.
FREE = vision_transformer.FREE | {"image_size"}
VILA_TYPE = "radio"
_PREFIX = "radio_model.model."
_NAMES = Names(
    patches=_PREFIX + "patch_generator.embedder.",
    positions=_PREFIX + "patch_generator.pos_embed",
    registers=_PREFIX + "patch_generator.cls_token.token",
    layer=_PREFIX + "blocks.{layer}.",
    attention_norm="norm1.",
    qkv=("attn.qkv.",),
    proj="attn.proj.",
    mlp_norm="norm2.",
    fc1="mlp.fc1.",
    fc2="mlp.fc2.",
)
_SCALES = {"attn.proj.": "layer_scale1.lambda1", "mlp.fc2.": "layer_scale2.lambda1"}
"""LayerScale, which RadioModel has and RADIO has not: transformers writes ones."""
# What the settings say too, the patches of videos, and the heads that imitate single teachers.
_UNUSED = (
    r"radio_model\.(summary_idxs|input_conditioner\..*|adaptors\..*)",
    r"radio_model\.model\.patch_generator\.video_embedder\..*",
)


def renames(settings: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return those of a backbone that was saved alone."""
    return ((r"base_model\.", _PREFIX),)


def rules(vision: Config) -> list[Rule]:
    """Return the table, which has only the layers that run."""
    return [_with_scale(_flattened(rule)) for rule in vision_rules(vision, _NAMES)]


def _flattened(rule: Rule) -> Rule:
    """Patches are a linear layer, class tokens and registers a table."""
    shapes = {
        ".conv1.weight": (rule.shape[0], -1),
        ".registers": rule.shape[1:],
    }
    for ending, theirs in shapes.items():
        if rule.key.endswith(ending):
            return replace(rule, transform=Reshaped(rule.shape, theirs))
    return rule


def _with_scale(rule: Rule) -> Rule:
    for name, scale in _SCALES.items():
        if rule.names[0].startswith(_NAMES.layer + name):
            return replace(rule, scale=_NAMES.layer + scale)
    return rule


def unused(vision: Config) -> tuple[str, ...]:
    """Return regular expressions for tensors that a folder may hold in addition to the table."""
    return (*_UNUSED, *unused_layers(vision, _NAMES))


def constants(vision: Config) -> dict[str, Tensor]:
    """Return what RadioModel has in its files although the settings say it; it leaves undefined what they lack."""
    prefix, ones = "radio_model.input_conditioner.", torch.ones(vision.hidden_size)
    names = [_NAMES.layer + scale for scale in _SCALES.values()]
    return {
        **{name.replace("{layer}", str(layer)): ones for layer in range(vision.num_layers_run) for name in names},
        "radio_model.summary_idxs": torch.tensor(vision.summary_tokens),
        prefix + "norm_mean": torch.tensor(vision.image_mean).view(3, 1, 1),
        prefix + "norm_std": torch.tensor(vision.image_std).view(3, 1, 1),
    }


def reason_against_llava(vision: Config) -> str | None:
    """Return that transformers' Llava takes one token before the patches away, not several."""
    return f"transformers' Llava does not take away the {vision.num_prefix_tokens} tokens before the patches"


def config_to_hf(vision: Config) -> dict[str, Any]:
    """Return config.json of a tower that ends with the layer whose output the projection gets.

    Raises:
        CheckpointError: transformers does not arrive at the width of the MLP.
    """
    ratio = vision.ffn_hidden_size / vision.hidden_size
    if int(vision.hidden_size * ratio) != vision.ffn_hidden_size:
        raise CheckpointError(
            f"ffn_hidden_size={vision.ffn_hidden_size} is no RadioModel, whose MLP is mlp_ratio times as wide as "
            f"hidden_size={vision.hidden_size}",
            where="model.vision",
            fix="use a multiple of hidden_size",
        )
    return {
        "architectures": ["RadioModel"],
        "model_type": "radio",
        "hidden_size": vision.hidden_size,
        "mlp_ratio": ratio,
        "num_hidden_layers": vision.num_layers_run,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "max_img_size": vision.position_grid * vision.patch_size,
        "num_cls_tokens": vision.num_class_tokens,
        "num_registers": vision.num_registers,
        "summary_idxs": list(vision.summary_tokens),
        "hidden_act": "gelu",
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "layerscale_value": 1.0,
        "layer_norm_eps": vision.layernorm_epsilon,
        "norm_mean": list(vision.image_mean),
        "norm_std": list(vision.image_std),
        "initializer_range": vision.init_method_std,
    }


def config_from_hf(settings: dict[str, Any], *, where: str, **chosen: Any) -> Config:
    """Return our settings.

    Args:
        settings: config.json of a RadioModel.
        where: the file, for messages.
        chosen: fields that override the file.

    Raises:
        CheckpointError: our tower does not support something in the settings.
    """
    read_activation(settings, "gelu", where=where)
    require_settings(settings, {"use_swiglu_ffn": False, "qkv_bias": True, "num_channels": 3}, where=where)
    # The defaults are those of transformers' RadioConfig; files omit values that equal them.
    hidden, patch = settings.get("hidden_size", 1280), settings.get("patch_size", 16)
    found: dict[str, Any] = {
        "image_size": settings.get("image_size", 224),
        "patch_size": patch,
        "position_grid": settings.get("max_img_size", 2048) // patch,
        "num_layers": settings.get("num_hidden_layers", 32),
        "hidden_size": hidden,
        "ffn_hidden_size": int(hidden * settings.get("mlp_ratio", 4.0)),
        "num_attention_heads": settings.get("num_attention_heads", 16),
        "num_class_tokens": settings.get("num_cls_tokens", 3),
        "num_registers": settings.get("num_registers", 7),
        "summary_tokens": tuple(settings.get("summary_idxs", (0, 1))),
        "layernorm_epsilon": float(settings.get("layer_norm_eps", 1e-6)),
        "init_method_std": float(settings.get("initializer_range", 0.02)),
    }
    for ours, theirs in (("image_mean", "norm_mean"), ("image_std", "norm_std")):
        if theirs in settings:
            found[ours] = tuple(settings[theirs])
    return Config(**{**found, **chosen})
