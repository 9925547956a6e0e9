"""One linear layer, which transformers' Llava holds as two.

With features of at most half the width of the embeddings, the first of the two puts x and -x side by side, and the
second subtracts what W makes of the negative part from what it makes of the positive one: relu(x) - relu(-x) is x,
exactly. Servers know this activation; they refuse `linear`, which is left for wider features, where the second layer is
the identity.
"""

import torch
from torch import Tensor

from megatron_vlm.config.projectors.linear import Config
from megatron_vlm.convert.projector import KEY_PREFIX, LlavaProjector, draw_linear
from megatron_vlm.convert.rules import LinearAsMLP, LinearAsPair, Rule, Transform

FITS_LLAVA = True
VILA_TYPES: dict[str, dict[str, str]] = {"linear": {}}
_LAYER = KEY_PREFIX + "encoder."


def llava(config: Config, *, input_size: int, output_size: int) -> LlavaProjector:
    """Return two layers that do what the one does."""
    shapes = {"weight": (output_size, input_size), "bias": (output_size,)}
    activation = "relu" if 2 * input_size <= output_size else "linear"

    def transform(kind: str) -> Transform:
        if activation == "relu":
            return LinearAsPair(input_size, output_size, of_bias=kind == "bias")
        return LinearAsMLP(output_size, of_bias=kind == "bias")

    rules = [
        Rule(_LAYER + kind, shape, (f"linear_1.{kind}", f"linear_2.{kind}"), transform(kind))
        for kind, shape in shapes.items()
    ]
    return LlavaProjector(activation, rules)


def vila_rules(config: Config, *, input_size: int, output_size: int) -> list[Rule]:
    """Return the table."""
    return [
        Rule(_LAYER + "weight", (output_size, input_size), ("layers.weight",)),
        Rule(_LAYER + "bias", (output_size,), ("layers.bias",)),
    ]


def draw(
    config: Config, *, input_size: int, output_size: int, std: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the initial weights."""
    return draw_linear(_LAYER, (output_size, input_size), std=std, generator=generator)
