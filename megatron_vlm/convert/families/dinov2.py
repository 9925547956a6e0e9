"""The DINOv2 family: tensor names of Dinov2Model and Dinov2WithRegistersModel, and settings of their config.json."""

from typing import Any

import torch
from torch import Tensor

from megatron_vlm.config import CheckpointError
from megatron_vlm.config.towers.dinov2 import Config
from megatron_vlm.convert import vision_transformer
from megatron_vlm.convert.rules import Rule
from megatron_vlm.convert.vision_transformer import (
    Names,
    read_activation,
    require_settings,
    unused_layers,
    vision_rules,
)

PART = "vision"
MODEL_TYPES = ("dinov2", "dinov2_with_registers", "Dinov2Model", "Dinov2WithRegistersModel")
FREE = vision_transformer.FREE | {"image_size", "post_norm"}
VILA_TYPE = "dinov2"
_MASK_TOKEN, _POST_NORM = "embeddings.mask_token", "layernorm."


def _names(vision: Config) -> Names:
    swiglu = vision.activation == "swiglu"
    return Names(
        patches="embeddings.patch_embeddings.projection.",
        positions="embeddings.position_embeddings",
        class_token="embeddings.cls_token",
        registers="embeddings.register_tokens",
        post_norm=_POST_NORM,
        layer="encoder.layer.{layer}.",
        attention_norm="norm1.",
        qkv=("attention.attention.query.", "attention.attention.key.", "attention.attention.value."),
        proj="attention.output.dense.",
        attention_scale="layer_scale1.lambda1",
        mlp_norm="norm2.",
        fc1="mlp.weights_in." if swiglu else "mlp.fc1.",
        fc2="mlp.weights_out." if swiglu else "mlp.fc2.",
        mlp_scale="layer_scale2.lambda1",
    )


def renames(settings: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the prefix of the tower in a model that classifies images."""
    return ((r"dinov2(_with_registers)?\.", ""),)


def rules(vision: Config) -> list[Rule]:
    """Return the table, which has only the layers that run."""
    return vision_rules(vision, _names(vision))


def unused(vision: Config) -> tuple[str, ...]:
    """Return regular expressions for tensors that a folder may hold in addition to the table."""
    return (r"embeddings\.mask_token", r"layernorm\..*", r"classifier\..*", *unused_layers(vision, _names(vision)))


def constants(vision: Config) -> dict[str, Tensor]:
    """Return the token of masked patches, and the last norm as the identity if the features do not pass it."""
    hidden = vision.hidden_size
    norm = {_POST_NORM + "weight": torch.ones(hidden), _POST_NORM + "bias": torch.zeros(hidden)}
    return {_MASK_TOKEN: torch.zeros(1, hidden), **({} if vision.post_norm else norm)}


def reason_against_llava(vision: Config) -> str | None:
    """Return that Llava takes hidden states, which have not passed the last norm, and drops no registers."""
    if vision.post_norm:
        return "transformers' Llava takes features before the last norm (model.vision.post_norm)"
    if vision.num_registers:
        return "transformers' Llava gives the registers to the projection"
    return None


def config_to_hf(vision: Config) -> dict[str, Any]:
    """Return config.json of a tower that ends with the layer whose output the projection gets.

    Raises:
        CheckpointError: no ratio in config.json gives the width of the MLP.
    """
    swiglu = vision.activation == "swiglu"
    ratio = vision.ffn_hidden_size * (1.5 if swiglu else 1) / vision.hidden_size
    if _ffn_hidden_size(vision.hidden_size, ratio, swiglu=swiglu) != vision.ffn_hidden_size:
        raise CheckpointError(
            f"a tower with ffn_hidden_size={vision.ffn_hidden_size} and swiglu is no Dinov2Model",
            where="model.vision",
            fix="use a multiple of 8",
        )
    kind: dict[str, Any] = {"architectures": ["Dinov2Model"], "model_type": "dinov2"}
    if vision.num_registers:
        kind = {
            "architectures": ["Dinov2WithRegistersModel"],
            "model_type": "dinov2_with_registers",
            "num_register_tokens": vision.num_registers,
        }
    return {
        **kind,
        "hidden_size": vision.hidden_size,
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "num_hidden_layers": vision.num_layers_run,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "image_size": vision.position_grid * vision.patch_size,
        "patch_size": vision.patch_size,
        "hidden_act": "gelu",
        "use_swiglu_ffn": swiglu,
        "qkv_bias": True,
        "layer_norm_eps": vision.layernorm_epsilon,
        "layerscale_value": 1.0,
        "initializer_range": vision.init_method_std,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
    }


def config_from_hf(settings: dict[str, Any], *, where: str, **chosen: Any) -> Config:
    """Return our settings.

    Args:
        settings: config.json of a Dinov2Model or Dinov2WithRegistersModel, or of one that classifies images.
        where: the file, for messages.
        chosen: fields that override the file.

    Raises:
        CheckpointError: our tower does not support something in the settings.
    """
    read_activation(settings, "gelu", where=where)
    require_settings(settings, {"qkv_bias": True}, where=where)
    swiglu, hidden = settings.get("use_swiglu_ffn", False), settings.get("hidden_size", 768)
    # The defaults are those of transformers' configs; files omit values that equal them.
    with_registers = "num_register_tokens" in settings or settings.get("model_type") == "dinov2_with_registers"
    image_size = settings.get("image_size", 224)
    patch_size = settings.get("patch_size", 16 if with_registers else 14)
    found: dict[str, Any] = {
        "image_size": image_size,
        "patch_size": patch_size,
        "position_grid": image_size // patch_size,
        "num_layers": settings.get("num_hidden_layers", 12),
        "hidden_size": hidden,
        "ffn_hidden_size": _ffn_hidden_size(hidden, settings.get("mlp_ratio", 4), swiglu=swiglu),
        "num_attention_heads": settings.get("num_attention_heads", 12),
        "activation": "swiglu" if swiglu else "gelu",
        "num_registers": settings.get("num_register_tokens", 4) if with_registers else 0,
        "layernorm_epsilon": float(settings.get("layer_norm_eps", 1e-6)),
        "init_method_std": float(settings.get("initializer_range", 0.02)),
    }
    return Config(**{**found, **chosen})


def _ffn_hidden_size(hidden_size: int, mlp_ratio: float, *, swiglu: bool) -> int:
    """Return the width of the MLP as transformers computes it: a gated one has about as many weights as a plain one."""
    plain = int(hidden_size * mlp_ratio)
    return (int(plain * 2 / 3) + 7) // 8 * 8 if swiglu else plain
