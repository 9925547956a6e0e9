"""Activation functions by their names in the settings."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _QuickGelu(torch.autograd.Function):
    """x * sigmoid(a x) is silu(a x) / a, whose gradient is that of silu at a x: one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scaled = x * 1.702
        ctx.save_for_backward(scaled)
        return F.silu(scaled).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, scaled)


def quick_gelu(x: Tensor) -> Tensor:
    """Return x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    out: Tensor = _QuickGelu.apply(x)
    return out


def gelu_tanh(x: Tensor) -> Tensor:
    """Return the tanh approximation of GELU (SigLIP)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_tanh": gelu_tanh}
