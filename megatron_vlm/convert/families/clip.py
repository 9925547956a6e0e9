"""The CLIP family: tensor names of CLIPVisionModel and settings of its config.json."""

from typing import Any, Literal

import torch
from torch import Tensor

from megatron_vlm.config import CheckpointError, ModelConfig
from megatron_vlm.config.towers.clip import Config
from megatron_vlm.convert.rules import QueryKeyValue, Reshaped, Rule

PART = "vision"
MODEL_TYPES = ("clip_vision_model", "clip")
RENAMES = ((r"(embeddings|encoder|pre_layrnorm|post_layernorm)\.", r"vision_model.\1."),)
"""transformers 5 saves a CLIPVisionModel without the prefix that transformers 4 and CLIPModel use."""

_PREFIX = "model.vision_model."
# CLIPModel also holds the text tower; the norm of the class token's last feature is not used here.
_UNUSED = (
    r"vision_model\.post_layernorm\..*",
    r".*\.position_ids",
    r"(text_model|text_projection|visual_projection)\..*",
    r"logit_scale",
)
_POST_NORM = "vision_model.post_layernorm."
_ACTIVATIONS: dict[Literal["quick_gelu", "gelu", "gelu_tanh"], str] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
}


def tower_of(model: ModelConfig) -> Config:
    """Return the tower's settings.

    Raises:
        CheckpointError: the model has a tower of another type.
    """
    if not isinstance(model.vision, Config):
        raise CheckpointError(
            f"the tower is of type {model.vision.type}, not clip",
            where="model.vision",
            fix="convert models with a clip tower only",
        )
    return model.vision


def rules(vision: Config) -> list[Rule]:
    """Return the table, which has only the layers that run."""
    hidden, ffn, layers = vision.hidden_size, vision.ffn_hidden_size, vision.num_layers_run
    patch, heads = vision.patch_size, vision.num_attention_heads
    qkv = QueryKeyValue(num_attention_heads=heads, num_query_groups=heads, kv_channels=hidden // heads)
    ours, theirs = _PREFIX + "decoder.layers.", "vision_model.encoder.layers.{layer}."
    attention, embeddings = theirs + "self_attn.", "vision_model.embeddings."
    class_token = Reshaped((1, 1, hidden), (hidden,))
    table = [
        Rule(_PREFIX + "class_token", (1, 1, hidden), (embeddings + "class_embedding",), class_token),
        Rule(_PREFIX + "conv1.weight", (hidden, 3, patch, patch), (embeddings + "patch_embedding.weight",)),
        Rule(
            _PREFIX + "position_embeddings.weight",
            (vision.position_grid**2 + 1, hidden),
            (embeddings + "position_embedding.weight",),
        ),
    ]
    for kind in ("weight", "bias"):
        columns = (hidden,) if kind == "weight" else ()
        per_layer = (
            ("self_attention.linear_proj.", (hidden, *columns), attention + "out_proj."),
            ("mlp.linear_fc1.", (ffn, *columns), theirs + "mlp.fc1."),
            ("mlp.linear_fc2.", (hidden, *((ffn,) if columns else ())), theirs + "mlp.fc2."),
            ("self_attention.linear_qkv.layer_norm_", (hidden,), theirs + "layer_norm1."),
            ("mlp.linear_fc1.layer_norm_", (hidden,), theirs + "layer_norm2."),
        )
        table.append(Rule(_PREFIX + "ln_pre." + kind, (hidden,), ("vision_model.pre_layrnorm." + kind,)))
        table += [Rule(ours + key + kind, shape, (name + kind,), num_layers=layers) for key, shape, name in per_layer]
        names = tuple(f"{attention}{part}_proj.{kind}" for part in "qkv")
        table.append(Rule(ours + "self_attention.linear_qkv." + kind, (3 * hidden, *columns), names, qkv, layers))
    return table


def unused(vision: Config) -> tuple[str, ...]:
    """Return regular expressions for tensors that a folder may hold in addition to the table."""
    beyond = range(vision.num_layers_run, vision.num_layers)
    return (*_UNUSED, *(rf"vision_model\.encoder\.layers\.{layer}\..*" for layer in beyond))


def constants(vision: Config) -> dict[str, Tensor]:
    """Return the norm of the class token's last feature, as the identity."""
    hidden = vision.hidden_size
    return {_POST_NORM + "weight": torch.ones(hidden), _POST_NORM + "bias": torch.zeros(hidden)}


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
        "hidden_act": _ACTIVATIONS[vision.activation],
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
    activations = {theirs: ours for ours, theirs in _ACTIVATIONS.items()}
    activation = settings.get("hidden_act", "quick_gelu")
    if activation not in activations:
        raise CheckpointError(
            f"the tower has hidden_act={activation}", where=where, fix=f"use one of {', '.join(activations)}"
        )
    found: dict[str, Any] = {
        # The defaults are those of transformers' CLIPVisionConfig; files omit values that equal them.
        "image_size": settings.get("image_size", 224),
        "patch_size": settings.get("patch_size", 32),
        "num_layers": settings.get("num_hidden_layers", 12),
        "hidden_size": settings.get("hidden_size", 768),
        "ffn_hidden_size": settings.get("intermediate_size", 3072),
        "num_attention_heads": settings.get("num_attention_heads", 12),
        "activation": activations[activation],
        "layernorm_epsilon": float(settings.get("layer_norm_eps", 1e-5)),
        "init_method_std": float(settings.get("initializer_range", 0.02)),
    }
    return Config(**{**found, **chosen})
