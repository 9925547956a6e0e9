"""Gradients that must exist even if the graph does not require them."""

from typing import Any

import torch
from torch import Tensor


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.shapes = [(p.shape, p.dtype, p.device) if p.requires_grad else None for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        zeros = [None if s is None else torch.zeros(s[0], dtype=s[1], device=s[2]) for s in ctx.shapes]
        return (grad, *zeros)


def give_zero_gradients(x: Tensor, *modules: torch.nn.Module) -> Tensor:
    """Return `x`; in the backward pass, every parameter of `modules` gets a zero gradient.

    A rank without images does not run the tower, but overlapped gradient reduction waits for all parameters.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    if not parameters or not torch.is_grad_enabled():
        return x
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    return _ZeroGradients.apply(x, *parameters)


def keep_gradient_path(x: Tensor, module: torch.nn.Module) -> Tensor:
    """Return `x`, made to require a gradient if `module` learns but nothing before it does.

    Otherwise recomputed layers, whose input then requires no gradient, silently drop the gradients of their weights.
    """
    if torch.is_grad_enabled() and not x.requires_grad and any(p.requires_grad for p in module.parameters()):
        return x.detach().requires_grad_()
    return x
