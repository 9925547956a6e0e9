"""The InternViT family as in transformers: tensor names of InternVLVisionModel and settings of its config.json."""

from typing import Any

from torch import Tensor

from megatron_vlm.config import CheckpointError
from megatron_vlm.config.towers.internvit import Config
from megatron_vlm.convert import vision_transformer
from megatron_vlm.convert.rules import Rule
from megatron_vlm.convert.vision_transformer import (
    Names,
    read_activation,
    require_settings,
    side_of,
    unused_layers,
    vision_rules,
)

PART = "vision"
MODEL_TYPES = ("internvl_vision", "InternVLVisionModel")
FREE = vision_transformer.FREE
VILA_TYPE = "intern_vit_6b"
NORMS = {"RMSNorm": "rms_norm", "LayerNorm": "layer_norm"}
"""Our names of the norms, and those in config.json."""
_NAMES = Names(
    patches="embeddings.patch_embeddings.projection.",
    positions="embeddings.position_embeddings",
    class_token="embeddings.cls_token",
    layer="encoder.layer.{layer}.",
    attention_norm="layernorm_before.",
    qkv=("attention.q_proj.", "attention.k_proj.", "attention.v_proj."),
    query_norm="attention.q_norm.",
    key_norm="attention.k_norm.",
    proj="attention.projection_layer.",
    attention_scale="lambda_1",
    mlp_norm="layernorm_after.",
    fc1="mlp.fc1.",
    fc2="mlp.fc2.",
    mlp_scale="lambda_2",
)
# The token of masked patches, and the norm of a tower whose output is its class token.
_UNUSED = (r"embeddings\.mask_token", r"layernorm\..*")
_QK_EPSILON = 1e-6


def renames(settings: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return no renames: all versions use the names of the table."""
    return ()


def rules(vision: Config) -> list[Rule]:
    """Return the table, which has only the layers that run."""
    return vision_rules(vision, _NAMES)


def unused(vision: Config) -> tuple[str, ...]:
    """Return regular expressions for tensors that a folder may hold in addition to the table."""
    return (*_UNUSED, *unused_layers(vision, _NAMES))


def constants(vision: Config) -> dict[str, Tensor]:
    """Return nothing: a folder has no other tensors."""
    return {}


def reason_against_llava(vision: Config) -> str | None:
    """Return that transformers 4.57 cannot: Llava asks for hidden states in a way that InternVLVisionModel refuses."""
    return "transformers' Llava cannot call InternVLVisionModel"


def config_to_hf(vision: Config) -> dict[str, Any]:
    """Return config.json of a tower that ends with the layer whose output the projection gets.

    Raises:
        CheckpointError: the epsilon of queries and keys is not the one that transformers has written down.
    """
    _check_epsilon(vision.qk_layernorm, vision.layernorm_epsilon, "model.vision.layernorm_epsilon")
    return {
        "architectures": ["InternVLVisionModel"],
        "model_type": "internvl_vision",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers_run,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "image_size": [vision.image_size, vision.image_size],
        "patch_size": [vision.patch_size, vision.patch_size],
        "hidden_act": "gelu",
        "norm_type": NORMS[vision.normalization],
        "layer_norm_eps": vision.layernorm_epsilon,
        "attention_bias": vision.add_qkv_bias,
        "use_qk_norm": vision.qk_layernorm,
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
        "layer_scale_init_value": 0.1,
        "initializer_range": vision.init_method_std,
        "attention_dropout": 0.0,
        "hidden_dropout_prob": 0.0,
        "projection_dropout": 0.0,
    }


def config_from_hf(settings: dict[str, Any], *, where: str, **chosen: Any) -> Config:
    """Return our settings.

    Args:
        settings: config.json of an InternVLVisionModel.
        where: the file, for messages.
        chosen: fields that override the file.

    Raises:
        CheckpointError: our tower does not support something in the settings.
    """
    read_activation(settings, "gelu", where=where)
    require_settings(settings, {"use_absolute_position_embeddings": True}, where=where)
    found: dict[str, Any] = {
        # The defaults are those of transformers' InternVLVisionConfig; files omit values that equal them.
        "image_size": side_of(settings.get("image_size", 448), where),
        "patch_size": side_of(settings.get("patch_size", 14), where),
        "num_layers": settings.get("num_hidden_layers", 24),
        "hidden_size": settings.get("hidden_size", 1024),
        "ffn_hidden_size": settings.get("intermediate_size", 4096),
        "num_attention_heads": settings.get("num_attention_heads", 16),
        "normalization": norm_of(settings.get("norm_type", "layer_norm"), where),
        "qk_layernorm": settings.get("use_qk_norm", False),
        "add_qkv_bias": settings.get("attention_bias", False),
        "layernorm_epsilon": float(settings.get("layer_norm_eps", 1e-6)),
        "init_method_std": float(settings.get("initializer_range", 0.02)),
    }
    _check_epsilon(found["qk_layernorm"], found["layernorm_epsilon"], where)
    return Config(**{**found, **chosen})


def norm_of(norm_type: str, where: str) -> str:
    """Return our name of a norm.

    Raises:
        CheckpointError: it is another one.
    """
    ours = {theirs: name for name, theirs in NORMS.items()}
    if norm_type not in ours:
        raise CheckpointError(f"the tower has norm_type={norm_type}", where=where, fix=f"use one of {', '.join(ours)}")
    return ours[norm_type]


def _check_epsilon(normalises: bool, epsilon: float, where: str) -> None:
    """Check the epsilon of the norms of queries and keys, which transformers does not take from config.json."""
    if normalises and epsilon != _QK_EPSILON:
        raise CheckpointError(
            f"queries and keys are normalised with {_QK_EPSILON}, other norms with {epsilon}",
            where=where,
            fix=f"use a tower with {_QK_EPSILON}",
        )
