"""The CLIP family: tensor names of CLIPVisionModel and settings of its config.json."""

from typing import Any

import torch
from torch import Tensor

from megatron_vlm.config.towers.clip import Config
from megatron_vlm.convert import vision_transformer
from megatron_vlm.convert.rules import Rule
from megatron_vlm.convert.vision_transformer import ACTIVATIONS, Names, read_activation, unused_layers, vision_rules

PART = "vision"
MODEL_TYPES = ("clip_vision_model", "clip", "CLIPVisionModel", "CLIPModel")
FREE = vision_transformer.FREE
VILA_TYPE = "clip_vision_model"
NAMES = Names(
    patches="vision_model.embeddings.patch_embedding.",
    positions="vision_model.embeddings.position_embedding.weight",
    class_token="vision_model.embeddings.class_embedding",
    class_token_shape=(),
    pre_norm="vision_model.pre_layrnorm.",
    layer="vision_model.encoder.layers.{layer}.",
    attention_norm="layer_norm1.",
    qkv=("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    proj="self_attn.out_proj.",
    mlp_norm="layer_norm2.",
    fc1="mlp.fc1.",
    fc2="mlp.fc2.",
)
# CLIPModel also holds the text tower; the norm of the class token's last feature is not used here.
_UNUSED = (
    r"vision_model\.post_layernorm\..*",
    r".*\.position_ids",
    r"(text_model|text_projection|visual_projection)\..*",
    r"logit_scale",
)


def renames(settings: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the prefix that transformers 4 and CLIPModel use, and a CLIPVisionModel of transformers 5 does not."""
    return ((r"(embeddings|encoder|pre_layrnorm|post_layernorm)\.", r"vision_model.\1."),)


def rules(vision: Config) -> list[Rule]:
    """Return the table, which has only the layers that run."""
    return vision_rules(vision, NAMES)


def unused(vision: Config) -> tuple[str, ...]:
    """Return regular expressions for tensors that a folder may hold in addition to the table."""
    return (*_UNUSED, *unused_layers(vision, NAMES))


def constants(vision: Config) -> dict[str, Tensor]:
    """Return the norm of the class token's last feature, as the identity."""
    return post_norm(vision.hidden_size)


def post_norm(hidden_size: int) -> dict[str, Tensor]:
    """Return a last norm that has no effect."""
    name = "vision_model.post_layernorm."
    return {name + "weight": torch.ones(hidden_size), name + "bias": torch.zeros(hidden_size)}


def reason_against_llava(vision: Config) -> str | None:
    """Return None: it is LLaVA's own tower."""
    return None


def config_to_hf(vision: Config) -> dict[str, Any]:
    """Return config.json of a tower that ends with the layer whose output the projection gets."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "projection_dim": vision.hidden_size,
        "num_hidden_layers": vision.num_layers_run,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": ACTIVATIONS[vision.activation],
        "layer_norm_eps": vision.layernorm_epsilon,
        "attention_dropout": 0.0,
        "initializer_range": vision.init_method_std,
        "initializer_factor": 1.0,
    }


def config_from_hf(settings: dict[str, Any], *, where: str, **chosen: Any) -> Config:
    """Return our settings.

    Args:
        settings: config.json of a CLIPVisionModel, or of a CLIPModel (its `vision_config` is taken).
        where: the file, for messages.
        chosen: fields that override the file.

    Raises:
        CheckpointError: the tower has an activation that ours does not support.
    """
    settings = settings.get("vision_config", settings)
    found: dict[str, Any] = {
        # The defaults are those of transformers' CLIPVisionConfig; files omit values that equal them.
        "image_size": settings.get("image_size", 224),
        "patch_size": settings.get("patch_size", 32),
        "num_layers": settings.get("num_hidden_layers", 12),
        "hidden_size": settings.get("hidden_size", 768),
        "ffn_hidden_size": settings.get("intermediate_size", 3072),
        "num_attention_heads": settings.get("num_attention_heads", 12),
        "activation": read_activation(settings, "quick_gelu", "gelu", "gelu_tanh", where=where),
        "layernorm_epsilon": float(settings.get("layer_norm_eps", 1e-5)),
        "init_method_std": float(settings.get("initializer_range", 0.02)),
    }
    return Config(**{**found, **chosen})
