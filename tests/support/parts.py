"""Tiny settings of every tower and projection: a type without them fails the tests that try all types."""

from dataclasses import replace
from typing import Any

from megatron_vlm.config import ModelConfig
from megatron_vlm.config.modules import module_names
from megatron_vlm.config.projectors import make_projector
from tests.support.configs import tiny_model, tiny_model_with_tower
from tests.support.vision_towers import TINY

PROJECTORS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp2x_gelu": {},
    "downsample": {},
    "mlp_downsample": {},
    "transformer_block": {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 3},
}
TOWER_NAMES = module_names("megatron_vlm.config.towers")
PROJECTOR_NAMES = module_names("megatron_vlm.config.projectors")


def tiny_tower(type: str) -> Any:
    """Return the settings of a tower of about 16 patches without a class token among its features."""
    variants = [settings for name, settings in TINY if name == type]
    assert variants, f"TINY in tests/support/vision_towers.py has no tiny settings for the tower {type}"
    settings = {name: value for name, value in variants[0].items() if name != "drop_class_token"}
    return tiny_model_with_tower(type, **settings).vision


def tiny_projector(type: str, **settings: Any) -> Any:
    """Return the settings of a projection; the given ones replace those of the table."""
    assert type in PROJECTORS, f"tests/support/parts.py has no tiny settings for the projection {type}"
    return make_projector(type, **{**PROJECTORS[type], **settings})


def tiny_model_of(tower: str = "clip", projector: str = "mlp2x_gelu") -> ModelConfig:
    """Return the tiny model with other parts."""
    return replace(tiny_model(), vision=tiny_tower(tower), projection=tiny_projector(projector))
