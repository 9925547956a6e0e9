"""What a layer of the decoder computes, in plain torch, from the matrices of an exported folder.

A search tries dozens of versions of one layer's matrices, in the names and shapes in which they are written. This runs
them without a model around them, so that only one layer need be in memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from megatron_vlm.config import LanguageConfig
from megatron_vlm.models.layers.rotary import rotary_table

QUERY_KEY_VALUE, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
LINEARS = (*QUERY_KEY_VALUE, "o_proj", *GATE_UP, "down_proj")
"""Matrices of a layer, float[out, in]."""
NORMS = ("input_layernorm", "post_attention_layernorm")

Weights = Mapping[str, Tensor]
"""Weights of a layer by the name of their module."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """A Llama layer; every `x` and every result is float[b, s, features]."""

    language: LanguageConfig

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x divided by its root mean square, times the weight."""
        return rms_norm(x, weight.shape, weight, self.language.layernorm_epsilon)

    def mix(self, normed: Tensor, weights: Weights) -> Tensor:
        """Return the output of all heads, side by side: the input of `o_proj`."""
        table = self._rotary_table(normed)
        channels = self.language.head_channels
        query, key, value = (
            linear(normed, weights[name]).unflatten(-1, (-1, channels)).transpose(1, 2) for name in QUERY_KEY_VALUE
        )
        query, key = _rotated(query, table), _rotated(key, table)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).flatten(2)

    def attention(self, normed: Tensor, weights: Weights) -> Tensor:
        """Return what the attention adds to the hidden state."""
        return linear(self.mix(normed, weights), weights["o_proj"])

    def gated(self, normed: Tensor, weights: Weights) -> Tensor:
        """Return the input of `down_proj`."""
        return silu(linear(normed, weights["gate_proj"])) * linear(normed, weights["up_proj"])

    def mlp(self, normed: Tensor, weights: Weights) -> Tensor:
        """Return what the MLP adds to the hidden state."""
        return linear(self.gated(normed, weights), weights["down_proj"])

    def __call__(self, hidden: Tensor, weights: Weights) -> Tensor:
        """Return the hidden state behind the layer."""
        hidden = hidden + self.attention(self.norm(hidden, weights[NORMS[0]]), weights)
        return hidden + self.mlp(self.norm(hidden, weights[NORMS[1]]), weights)

    def _rotary_table(self, like: Tensor) -> Tensor:
        """Return [s, 2 d]: cosines, then signed sines."""
        channels = self.language.head_channels
        exponents = torch.arange(0, channels, 2, device=like.device, dtype=torch.float32) / channels
        positions = torch.arange(like.shape[1], device=like.device, dtype=torch.int32)
        return rotary_table(positions, 1.0 / self.language.rotary_base**exponents, like.dtype)[:, 0, 0]


def _rotated(x: Tensor, table: Tensor) -> Tensor:
    cos, sin = table.chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, first), dim=-1) * sin
