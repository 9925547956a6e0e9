"""Data parallelism of the vision tower over the tensor-parallel group.

Each tensor-parallel rank encodes its own share of the images of a micro-batch; the features are gathered. The tower and
the projection are whole on every rank, so there is no collective inside them and any head count works.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_vlm.parallel.slicing import ImageShare

ProcessGroup = torch.distributed.ProcessGroup


def own_group() -> ProcessGroup:
    """Return a new group of this rank alone, without the other ranks taking part."""
    return torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)


def mark_replicated(module: torch.nn.Module) -> None:
    """Mark the parameters of a module that is whole on every tensor-parallel rank and sees other images on each.

    megatron-core then averages their gradients over these ranks and counts each once in the gradient norm.
    """
    for parameter in module.parameters():
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        parameter.sequence_parallel = False  # type: ignore[attr-defined]
        parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = local.new_empty((group.size() * local.size(0), *local.shape[1:]))
        torch.distributed.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        size, rank = ctx.group.size(), ctx.group.rank()
        # Every rank holds the whole gradient. Its slice is scaled by the group size because the gradients of replicated
        # parameters are averaged afterwards, and the sum over all images is wanted.
        return grad.chunk(size)[rank] * size, None


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.shapes = [(p.shape, p.dtype, p.device) if p.requires_grad else None for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        zeros = [None if s is None else torch.zeros(s[0], dtype=s[1], device=s[2]) for s in ctx.shapes]
        return (grad, *zeros)


def gather_features(local: Tensor, num_images: int, group: ProcessGroup) -> Tensor:
    """Gather the features of all images of a micro-batch.

    Args:
        local: float[share, p, h]; this rank's `ImageShare`.
        num_images: images of the whole micro-batch.
        group: the tensor-parallel ranks.

    Returns:
        float[num_images, p, h], in the order of the batch.
    """
    if group.size() == 1:
        return local
    share = ImageShare(size=group.size()).images_per_rank(num_images)
    if local.size(0) < share:
        local = torch.cat([local, local.new_zeros((share - local.size(0), *local.shape[1:]))])
    return _GatherFeatures.apply(local, group)[:num_images]


def give_zero_gradients(x: Tensor, *modules: torch.nn.Module) -> Tensor:
    """Return `x`; in the backward pass every parameter of `modules` gets a gradient of zero.

    A rank without images does not run the tower, but overlapped gradient reduction waits for every parameter.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    if not parameters or not torch.is_grad_enabled():
        return x
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    return _ZeroGradients.apply(x, *parameters)
