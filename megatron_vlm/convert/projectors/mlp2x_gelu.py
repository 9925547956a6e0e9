"""Two linear layers with a GELU between them, the projector of LLaVA-1.5."""

import torch
from torch import Tensor

from megatron_vlm.config.projectors.mlp2x_gelu import Config
from megatron_vlm.convert.projector import KEY_PREFIX, LlavaProjector, draw_linear
from megatron_vlm.convert.rules import Rule

FITS_LLAVA = True
VILA_TYPES: dict[str, dict[str, str]] = {"mlp2x_gelu": {}}
_FIRST, _SECOND = KEY_PREFIX + "encoder.linear_fc1.", KEY_PREFIX + "encoder.linear_fc2."


def llava(config: Config, *, input_size: int, output_size: int) -> LlavaProjector:
    """Return the two layers."""
    return LlavaProjector("gelu", _rules("linear_1.", "linear_2.", input_size, output_size))


def vila_rules(config: Config, *, input_size: int, output_size: int) -> list[Rule]:
    """Return the table."""
    return _rules("layers.0.", "layers.2.", input_size, output_size)


def _rules(first: str, second: str, input_size: int, output_size: int) -> list[Rule]:
    return [
        Rule(_FIRST + "weight", (output_size, input_size), (first + "weight",)),
        Rule(_FIRST + "bias", (output_size,), (first + "bias",)),
        Rule(_SECOND + "weight", (output_size, output_size), (second + "weight",)),
        Rule(_SECOND + "bias", (output_size,), (second + "bias",)),
    ]


def draw(
    config: Config, *, input_size: int, output_size: int, std: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the initial weights."""
    # megatron-core scales the layer before a residual sum by 1 / sqrt(2 * layers), and counts the projection as one.
    return {
        **draw_linear(_FIRST, (output_size, input_size), std=std, generator=generator),
        **draw_linear(_SECOND, (output_size, output_size), std=std / 2**0.5, generator=generator),
    }
