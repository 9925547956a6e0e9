"""Operations that a GPU does in one kernel and torch's CPU build, also on fake tensors, in several.

What the several would keep for the backward pass is not what a GPU keeps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FLASH_DTYPES = (torch.float16, torch.bfloat16)


def install() -> None:
    """Send these operations on tensors of the fake device to the operators that a GPU runs."""
    for name, make in (("rms_norm", _rms_norm), ("scaled_dot_product_attention", _attention)):
        setattr(F, name, make(getattr(F, name)))


def _rms_norm(original: Any) -> Any:
    def rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if not x.is_cuda:
            return original(x, normalized_shape, weight, eps)
        return _FusedRMSNorm.apply(x, weight)

    return rms_norm


class _FusedRMSNorm(torch.autograd.Function):
    """Keeps what torch's kernel keeps: its input, the weight, and one float32 for each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def _attention(original: Any) -> Any:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        arguments: dict[str, Any] = {"is_causal": is_causal, "scale": scale}
        if not query.is_cuda:
            arguments.update(attn_mask=attn_mask, dropout_p=dropout_p, enable_gqa=enable_gqa)
            return original(query, key, value, **arguments)
        if enable_gqa:
            groups = query.size(1) // key.size(1)
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if query.dtype in _FLASH_DTYPES and attn_mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, **arguments)[0]
        keeps_sums = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, keeps_sums, dropout_p, **arguments
        )[0]

    return attention
