"""Gradients that must exist even if the graph does not require them."""

import torch
from torch import Tensor


def keep_gradient_path(x: Tensor, module: torch.nn.Module) -> Tensor:
    """Return `x`, made to require a gradient if `module` learns but nothing before it does.

    Otherwise recomputed layers, whose input then requires no gradient, silently drop the gradients of their weights.
    """
    if torch.is_grad_enabled() and not x.requires_grad and any(p.requires_grad for p in module.parameters()):
        return x.detach().requires_grad_()
    return x
