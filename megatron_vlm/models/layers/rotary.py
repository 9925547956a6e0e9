"""Rotary position embeddings without transformer-engine: one table a micro-batch, applied in place.

megatron-core's own rotation of packed samples reads their borders on the host in every layer, which makes the host wait
for the device. Here the borders become positions on the device, once for all layers.
"""

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor


def positions_in_samples(num_positions: int, cu_seqlens: Tensor) -> Tensor:
    """Return the position of each token inside its own sample, without a wait for the device.

    Args:
        num_positions: t, length of the packed sequence [tokens].
        cu_seqlens: int32[n + 1]; sample borders, from 0. Positions behind the last one count from it.

    Returns:
        int32[t].
    """
    positions = torch.arange(num_positions, dtype=torch.int32, device=cu_seqlens.device)
    return positions - cu_seqlens[torch.searchsorted(cu_seqlens, positions, right=True) - 1]


def rotary_table(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> Tensor:
    """Return cosines and signed sines of every position, as `rotate` takes them.

    Args:
        positions: int32[s].
        inv_freq: float32[d / 2]; angle of each channel pair per position [rad].
        dtype: of the queries and keys.

    Returns:
        [s, 1, 1, 2 d]: cosines of the d channels, then their sines, negative for the first half of the channels.

    Source: RoFormer, arXiv:2104.09864, section 3.4.2; pairs are (i, i + d / 2), as in Llama.
    """
    angles = torch.outer(positions.to(inv_freq.dtype), inv_freq)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos, -sin, sin), dim=-1)[:, None, None, :]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None) -> Tensor:
    """Return `x` rotated; `out` may be x itself."""
    first, second = x.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1).mul_(sin)
    return torch.mul(x, cos, out=out).add_(swapped)


class _Rotate(torch.autograd.Function):
    """Rotates queries and keys in place.

    They are views of the product of the QKV projection, which no backward pass reads; a copy of them would have to be
    kept beside the values, which live in the same memory. `.data` hides the change from autograd, which refuses to
    change one of several views of a tensor, although here each of them has one user.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(table)
        cos, sin = table.chunk(2, dim=-1)
        for x in (query, key):
            _rotated(x.data, cos, sin, out=x.data)
        return query, key

    @staticmethod
    def backward(ctx: Any, query_grad: Tensor, key_grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        (table,) = ctx.saved_tensors
        cos, sin = table.chunk(2, dim=-1)
        return _rotated(query_grad, cos, -sin, None), _rotated(key_grad, cos, -sin, None), None


def rotate(query: Tensor, key: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions, in place.

    Args:
        query: float[s, b, n, d]; overwritten. The backward pass of what made it must not need its values.
        key: float[s, b, n, d], with the key heads; overwritten.
        table: [s, 1, 1, 2 d], from `rotary_table`.

    Returns:
        Both, rotated.
    """
    result: tuple[Tensor, Tensor] = _Rotate.apply(query, key, table)
    return result


class RotarySelfAttention(SelfAttention):
    """megatron-core's self-attention with this module's rotation.

    Without a key/value cache, `rotary_pos_emb` is a `rotary_table`, and megatron-core's own rotation is left out. It
    stays a single tensor, so it passes through the arguments of recomputed layers. With a cache everything is
    megatron-core's.
    """

    _table: Tensor | None = None

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        rotary_pos_emb: Tensor | None = None,
        inference_context: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attend; see megatron-core's `Attention.forward`."""
        if inference_context is not None:
            options.update(rotary_pos_emb=rotary_pos_emb, inference_context=inference_context)
            return super().forward(hidden_states, attention_mask, **options)
        self._table = rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, **options)
        finally:
            self._table = None

    def get_query_key_value_tensors(self, *arguments: Any, **options: Any) -> Any:
        """Return queries, keys and values; the first two are rotated if there is a table."""
        query, key, value = super().get_query_key_value_tensors(*arguments, **options)
        if self._table is not None:
            query, key = rotate(query, key, self._table)
        return query, key, value
