"""The InternViT family as published by OpenGVLab: tensor names of InternVisionModel and settings of its config.json."""

from typing import Any

from torch import Tensor

from megatron_vlm.config.towers.internvit import Config
from megatron_vlm.convert.families import internvit
from megatron_vlm.convert.rules import Rule
from megatron_vlm.convert.vision_transformer import Names, read_activation, unused_layers, vision_rules

PART = "vision"
MODEL_TYPES = ("intern_vit_6b", "InternVisionModel")
_NAMES = Names(
    patches="embeddings.patch_embedding.",
    positions="embeddings.position_embedding",
    class_token="embeddings.class_embedding",
    layer="encoder.layers.{layer}.",
    attention_norm="norm1.",
    qkv=("attn.qkv.",),
    query_norm="attn.q_norm.",
    key_norm="attn.k_norm.",
    proj="attn.proj.",
    attention_scale="ls1",
    mlp_norm="norm2.",
    fc1="mlp.fc1.",
    fc2="mlp.fc2.",
    mlp_scale="ls2",
)


def renames(settings: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return no renames: all versions use the names of the table."""
    return ()


def rules(vision: Config) -> list[Rule]:
    """Return the table, which has only the layers that run."""
    return vision_rules(vision, _NAMES)


def unused(vision: Config) -> tuple[str, ...]:
    """Return regular expressions for tensors that a folder may hold in addition to the table."""
    return unused_layers(vision, _NAMES)


def constants(vision: Config) -> dict[str, Tensor]:
    """Return nothing: a folder has no other tensors."""
    return {}


def config_to_hf(vision: Config) -> dict[str, Any]:
    """Return config.json of a tower that ends with the layer whose output the projection gets."""
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers_run,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": "gelu",
        "norm_type": internvit.NORMS[vision.normalization],
        "layer_norm_eps": vision.layernorm_epsilon,
        "qkv_bias": vision.add_qkv_bias,
        "qk_normalization": vision.qk_layernorm,
        "initializer_factor": 0.1,
        "initializer_range": vision.init_method_std,
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
    }


def config_from_hf(settings: dict[str, Any], *, where: str, **chosen: Any) -> Config:
    """Return our settings.

    Args:
        settings: config.json of an InternVisionModel.
        where: the file, for messages.
        chosen: fields that override the file.

    Raises:
        CheckpointError: the tower has an activation or a norm that ours does not support.
    """
    read_activation(settings, "gelu", where=where)
    found: dict[str, Any] = {
        # The defaults are those of OpenGVLab's InternVisionConfig; files omit values that equal them.
        "image_size": settings.get("image_size", 224),
        "patch_size": settings.get("patch_size", 14),
        "num_layers": settings.get("num_hidden_layers", 48),
        "hidden_size": settings.get("hidden_size", 3200),
        "ffn_hidden_size": settings.get("intermediate_size", 12800),
        "num_attention_heads": settings.get("num_attention_heads", 25),
        "normalization": internvit.norm_of(settings.get("norm_type", "rms_norm"), where),
        "qk_layernorm": settings.get("qk_normalization", True),
        "add_qkv_bias": settings.get("qkv_bias", False),
        "layernorm_epsilon": float(settings.get("layer_norm_eps", 1e-6)),
    }
    return Config(**{**found, **chosen})
