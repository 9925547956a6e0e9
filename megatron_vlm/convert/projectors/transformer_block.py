"""Transformer layers between two linear layers. Neither transformers' Llava nor VILA's code has this projection."""

from typing import Any

import torch
from torch import Tensor

from megatron_vlm.config.projectors.transformer_block import Config
from megatron_vlm.convert.projector import KEY_PREFIX, draw_linear, draw_norm

FITS_LLAVA = False
VILA_TYPES: dict[str, dict[str, str]] = {}
_LAYERS = KEY_PREFIX + "decoder.layers."


def llava(config: Config, *, input_size: int, output_size: int) -> None:
    """Return None: the class maps each feature alone."""


def vila_rules(config: Config, *, input_size: int, output_size: int) -> None:
    """Return None: the code has no such projection."""


def draw(
    config: Config, *, input_size: int, output_size: int, std: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the initial weights; those of all layers are stacked."""
    layers, hidden, ffn = config.num_layers, config.hidden_size, config.ffn_width
    rest: dict[str, Any] = {"std": std, "generator": generator}
    # megatron-core scales the layers before a residual sum by 1 / sqrt(2 * layers).
    last: dict[str, Any] = {"std": std / (2 * layers) ** 0.5, "generator": generator}
    return {
        **draw_linear(KEY_PREFIX + "linear_in.encoder.", (hidden, input_size), **rest),
        **draw_norm(_LAYERS + "self_attention.linear_qkv.layer_norm_", (layers, hidden)),
        **draw_linear(_LAYERS + "self_attention.linear_qkv.", (layers, 3 * hidden, hidden), **rest),
        **draw_linear(_LAYERS + "self_attention.linear_proj.", (layers, hidden, hidden), **last),
        **draw_norm(_LAYERS + "mlp.linear_fc1.layer_norm_", (layers, hidden)),
        **draw_linear(_LAYERS + "mlp.linear_fc1.", (layers, ffn, hidden), **rest),
        **draw_linear(_LAYERS + "mlp.linear_fc2.", (layers, hidden, ffn), **last),
        **draw_norm(KEY_PREFIX + "norm.", (hidden,)),
        **draw_linear(KEY_PREFIX + "linear_out.encoder.", (output_size, hidden), **rest),
    }
