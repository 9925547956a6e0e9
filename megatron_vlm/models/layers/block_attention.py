"""Attention inside each sample of a packed sequence on the CPU, one block of queries after the other.

Every block of queries meets only the keys up to its own end, in two plain matrix products forward and five backward.
In samples of at most 1,024 tokens the weights are kept; in longer ones they are computed again in the backward pass, as
in FlashAttention (arXiv:2205.14135). torch's own kernel for the CPU always computes them again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_BLOCK = 64
# Weights of at most so many keys are kept for the backward pass, so memory stays proportional to the tokens.
_MAX_KEPT = 1024

_Sizes = tuple[Sequence[int], Sequence[int]]
"""Queries and keys of each sample."""


def attend_by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    causal: bool,
    num_keys: Sequence[int] | None = None,
) -> Tensor:
    """Attend inside each sample.

    Args:
        query: float[t, n, d].
        key: float[u, g, d]; n is a multiple of g, and heads of a group follow each other.
        value: float[u, g, d].
        lengths: of the samples; their sum is t [tokens].
        scale: of the scores.
        causal: whether a token attends only to those before it and itself.
        num_keys: of each sample, if there are more than queries: these stand at its end. Their sum is u [tokens].

    Returns:
        float[t, n, d], contiguous.
    """
    out: Tensor = _BlockAttention.apply(
        query, key, value, (lengths, lengths if num_keys is None else num_keys), scale, causal
    )
    return out


class _Block(NamedTuple):
    """Queries [first, last) of the packed sequence, and the keys that they see, [start, end) of the packed keys."""

    first: int
    last: int
    start: int
    end: int


def _blocks(sizes: _Sizes, causal: bool) -> list[_Block]:
    blocks, begin, start = [], 0, 0
    for length, num_keys in zip(*sizes, strict=True):
        stop, end = begin + length, start + num_keys
        for first in range(begin, stop, _BLOCK):
            last = min(first + _BLOCK, stop)
            blocks.append(_Block(first, last, start, end - (stop - last) if causal else end))
        begin, start = stop, end
    return blocks


class _BlockAttention(torch.autograd.Function):
    """Works on queries as float[g, t * r, d]: token by token, and the r heads of a group for each token."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sizes: _Sizes, scale: float, causal: bool
    ) -> Tensor:
        by_group = _by_group(query, key.size(1), scale)
        keys, values, out = _by_head(key), _by_head(value), torch.empty_like(by_group)
        heads = query.size(1) // key.size(1)
        mask, kept = _later(heads) if causal else None, []
        for first, last, start, end in _blocks(sizes, causal):
            weights = _weights(by_group[:, first * heads : last * heads], keys[:, start:end], mask)
            out[:, first * heads : last * heads] = torch.bmm(weights, values[:, start:end])
            kept.append(weights if end - start <= _MAX_KEPT else None)
        out = _by_token(out, query.shape)
        ctx.save_for_backward(query, key, value, out, *kept)
        ctx.sizes, ctx.scale, ctx.causal = sizes, scale, causal
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, *kept = ctx.saved_tensors
        groups, heads = key.size(1), query.size(1) // key.size(1)
        queries, grads = _by_group(query, groups, ctx.scale), _by_group(grad, groups, 1.0)
        # The softmax takes the weighted mean of its gradients away: the product of output and gradient.
        means = _by_group((grad * out).sum(-1, keepdim=True), groups, 1.0)
        keys, values, query_grads = _by_head(key), _by_head(value), torch.empty_like(queries)
        key_grads, value_grads = torch.zeros_like(keys), torch.zeros_like(values)
        mask = _later(heads) if ctx.causal else None
        for (first, last, start, end), weights in zip(_blocks(ctx.sizes, ctx.causal), kept, strict=True):
            rows, seen = slice(first * heads, last * heads), slice(start, end)
            block, block_grad, seen_keys = queries[:, rows], grads[:, rows], keys[:, seen]
            if weights is None:
                weights = _weights(block, seen_keys, mask)
            value_grads[:, seen].baddbmm_(weights.transpose(1, 2), block_grad)
            scores = torch.bmm(block_grad, values[:, seen].transpose(1, 2)).sub_(means[:, rows]).mul_(weights)
            key_grads[:, seen].baddbmm_(scores.transpose(1, 2), block)
            query_grads[:, rows] = torch.bmm(scores, seen_keys)
        key_grad, value_grad = key_grads.transpose(0, 1), value_grads.transpose(0, 1)
        return _by_token(query_grads.mul_(ctx.scale), query.shape), key_grad, value_grad, None, None, None


def _by_group(x: Tensor, groups: int, scale: float) -> Tensor:
    """Return float[t, g * r, d], scaled, as float[g, t * r, d]."""
    view = x.unflatten(1, (groups, -1)).transpose(0, 1)
    return torch.mul(view, scale, out=x.new_empty(view.shape)).flatten(1, 2)


def _by_head(x: Tensor) -> Tensor:
    """Return float[t, g, d] as float[g, t, d]; torch multiplies batches of matrices at once only if each is dense."""
    return x.transpose(0, 1).contiguous()


def _by_token(x: Tensor, shape: torch.Size) -> Tensor:
    """Return float[g, t * r, d] as float[t, g * r, d]."""
    return x.unflatten(1, (shape[0], -1)).transpose(0, 1).reshape(shape)


def _later(heads: int) -> Tensor:
    """Return bool[block * heads, block]: whether the key comes after the query, inside a block."""
    return torch.ones(_BLOCK, _BLOCK, dtype=torch.bool).triu(1).repeat_interleave(heads, dim=0)


def _weights(queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """Return the weights of the keys that a block of queries sees, float[g, block * r, keys]."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    if mask is not None:
        rows = queries.size(1)
        size = rows * _BLOCK // mask.size(0)
        scores[:, :, -size:].masked_fill_(mask[:rows, :size], float("-inf"))
    return scores.softmax(-1)
