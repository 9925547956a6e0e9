"""One linear layer. LLaVA's projector has two, so the second is written as the identity."""

import torch
from torch import Tensor

from megatron_vlm.config.projectors.linear import Config
from megatron_vlm.convert.projector import KEY_PREFIX, draw_linear
from megatron_vlm.convert.rules import LinearAsMLP, Rule

ACTIVATION = "linear"
_LAYER = KEY_PREFIX + "encoder."


def rules(config: Config, *, input_size: int, output_size: int) -> list[Rule]:
    """Return the table."""
    weight, bias = (LinearAsMLP(output_size, of_bias) for of_bias in (False, True))
    return [
        Rule(_LAYER + "weight", (output_size, input_size), ("linear_1.weight", "linear_2.weight"), weight),
        Rule(_LAYER + "bias", (output_size,), ("linear_1.bias", "linear_2.bias"), bias),
    ]


def draw(
    config: Config, *, input_size: int, output_size: int, std: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the initial weights."""
    return draw_linear(_LAYER, (output_size, input_size), std=std, generator=generator)
