"""Gradient clipping that never makes the host wait for the device.

megatron-core reads the norm on the host to compare it with the bound. Here the norm stays on the device, and the
optimizer divides the gradients by a factor that is 1 where the norm is within the bound.
"""

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_vlm.checkpoint.adam_state import inner_optimizers

# megatron-core's: keeps the factor finite.
_EPSILON = 1e-6


@torch.no_grad()
def clipped_step(optimizer: MegatronOptimizer, max_norm: float, device: torch.device) -> Tensor:
    """Clip the gradients by their norm over all ranks and update the weights; all ranks call it together.

    Args:
        optimizer: after the gradients of all micro-batches are finished.
        max_norm: the largest norm that is not clipped; 0: no clipping.
        device: of the result, also on a rank that trains no parameter.

    Returns:
        float64[], the norm before clipping. It is the same on every rank.
    """
    norm = ready_gradients(optimizer, device)
    clipped_update(optimizer, max_norm, norm)
    return norm


@torch.no_grad()
def ready_gradients(optimizer: MegatronOptimizer, device: torch.device) -> Tensor:
    """Hand the finished gradients to the optimizer and return their norm, as `clipped_step` does; no weight changes."""
    optimizer.prepare_grads()
    return gradient_norm(optimizer, device)


@torch.no_grad()
def clipped_update(optimizer: MegatronOptimizer, max_norm: float, norm: Tensor) -> None:
    """Update the weights with the gradients of `ready_gradients`, clipped by their norm."""
    if max_norm > 0:
        _divide_gradients(optimizer, ((norm + _EPSILON) / max_norm).clamp(min=1.0))
    optimizer.step_with_ready_grads()


def gradient_norm(optimizer: MegatronOptimizer, device: torch.device) -> Tensor:
    """Return float64[], the L2 norm of the gradients of all parameters, each counted once over all ranks."""
    inner = inner_optimizers(optimizer)
    # megatron-core leaves out what other tensor-parallel ranks or the other end of the pipeline count.
    grads = [grad for one in inner for grad in one.get_main_grads_for_grad_norm()]
    square = torch.zeros((), dtype=torch.float64, device=device)
    if grads:
        square = torch.stack(torch._foreach_norm(grads)).double().square().sum()
    group = optimizer.get_grad_stats_parallel_group()
    if group.size() > 1:
        torch.distributed.all_reduce(square, group=group)
    return square.sqrt()


def _divide_gradients(optimizer: MegatronOptimizer, divisor: Tensor) -> None:
    """Divide all gradients by `divisor`, float64[] >= 1, before or in the next update."""
    for inner in inner_optimizers(optimizer):
        adam = getattr(inner, "optimizer", None)
        if adam is None:
            continue
        if _divides_by_itself(adam):
            adam.grad_scale = divisor.float()
        elif not (divisor.is_cpu and float(divisor) == 1.0):
            grads = [parameter.grad for parameter in inner.get_parameters() if parameter.grad is not None]
            torch._foreach_mul_(grads, divisor.reciprocal().float())


def _divides_by_itself(adam: Any) -> bool:
    """Whether the update takes the divisor that torch's GradScaler would give it, which saves a pass over memory."""
    return isinstance(adam, torch.optim.AdamW) and all(group["fused"] for group in adam.param_groups)
