"""The SigLIP family: tensor names of SiglipVisionModel and settings of its config.json."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_vlm.config.towers.siglip import Config
from megatron_vlm.convert import vision_transformer
from megatron_vlm.convert.families import clip
from megatron_vlm.convert.rules import Rule
from megatron_vlm.convert.vision_transformer import read_activation, unused_layers, vision_rules

PART = "vision"
MODEL_TYPES = ("siglip_vision_model", "siglip", "SiglipVisionModel", "SiglipModel")
FREE = vision_transformer.FREE
VILA_TYPE = "siglip_vision_model"
NAMES = replace(clip.NAMES, class_token="", pre_norm="")
# SiglipModel also holds the text tower. The last norm and the attention pool after it make one vector of an image.
_UNUSED = (
    r"vision_model\.(post_layernorm|head)\..*",
    r".*\.position_ids",
    r"text_model\..*",
    r"logit_(scale|bias)",
)


def renames(settings: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the prefix that transformers 4 and SiglipModel use, and a SiglipVisionModel of transformers 5 does not."""
    return ((r"(embeddings|encoder|post_layernorm|head)\.", r"vision_model.\1."),)


def rules(vision: Config) -> list[Rule]:
    """Return the table, which has only the layers that run."""
    return vision_rules(vision, NAMES)


def unused(vision: Config) -> tuple[str, ...]:
    """Return regular expressions for tensors that a folder may hold in addition to the table."""
    return (*_UNUSED, *unused_layers(vision, NAMES))


def constants(vision: Config) -> dict[str, Tensor]:
    """Return the last norm, as the identity; `vision_use_head` in config.json says that there is no attention pool."""
    return clip.post_norm(vision.hidden_size)


def reason_against_llava(vision: Config) -> str | None:
    """Return None: LLaVA takes it."""
    return None


def config_to_hf(vision: Config) -> dict[str, Any]:
    """Return config.json of a tower that ends with the layer whose output the projection gets."""
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers_run,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": vision.layernorm_epsilon,
        "attention_dropout": 0.0,
        "vision_use_head": False,
    }


def config_from_hf(settings: dict[str, Any], *, where: str, **chosen: Any) -> Config:
    """Return our settings.

    Args:
        settings: config.json of a SiglipVisionModel, or of a SiglipModel (its `vision_config` is taken).
        where: the file, for messages.
        chosen: fields that override the file.

    Raises:
        CheckpointError: the tower has another activation than SigLIP's.
    """
    settings = settings.get("vision_config", settings)
    read_activation(settings, "gelu_tanh", where=where)
    found: dict[str, Any] = {
        # The defaults are those of transformers' SiglipVisionConfig; files omit values that equal them.
        "image_size": settings.get("image_size", 224),
        "patch_size": settings.get("patch_size", 16),
        "num_layers": settings.get("num_hidden_layers", 12),
        "hidden_size": settings.get("hidden_size", 768),
        "ffn_hidden_size": settings.get("intermediate_size", 3072),
        "num_attention_heads": settings.get("num_attention_heads", 12),
        "layernorm_epsilon": float(settings.get("layer_norm_eps", 1e-6)),
    }
    return Config(**{**found, **chosen})
