"""Data parallelism of the vision parts over the tensor- and context-parallel ranks.

Each of these ranks, which have the same rows, encodes its own share of the images of a micro-batch, and the features
are gathered. Every rank holds the whole tower and projection, so they contain no collectives and any number of heads
works. A tower that is split over the tensor-parallel ranks sees the same images on each of them, which leaves the
context-parallel ranks to share them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_vlm.models.layers.replicas import ReplicaGroups
from megatron_vlm.parallel.slicing import ImageShare

ProcessGroup = torch.distributed.ProcessGroup


@dataclass(frozen=True, slots=True)
class ImageGroups:
    """Ranks that share the images of a micro-batch; those of `tensor` are neighbours in `all`."""

    tensor: ProcessGroup
    """With the same positions of the rows; only this rank if the tower is split."""
    context: ProcessGroup
    """With other positions."""
    all: ProcessGroup

    @classmethod
    def of_this_rank(cls, tower: ReplicaGroups) -> "ImageGroups":
        """Return the groups of megatron-core's parallel state.

        Args:
            tower: groups of the tower.
        """
        tensor, context = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group()
        if tower.tensor.size() > 1:
            return cls(tower.own, context, context)
        together = parallel_state.get_tensor_and_context_parallel_group() if context.size() > 1 else tensor
        return cls(tensor, context, together)


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, groups: ImageGroups) -> Tensor:
        ctx.groups = groups
        gathered = local.new_empty((groups.all.size() * local.size(0), *local.shape[1:]))
        torch.distributed.all_gather_into_tensor(gathered, local.contiguous(), group=groups.all)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        tensor, context = ctx.groups.tensor, ctx.groups.context
        # Tensor-parallel ranks have the same gradient, and each takes its slice. The gradients of replicated parameters
        # are averaged over them later, but should be summed over all images: hence the factor.
        shares = grad.unflatten(0, (context.size(), tensor.size(), -1))[:, tensor.rank()] * tensor.size()
        if context.size() == 1:
            return shares[0], None
        # A context-parallel rank has the gradient of its own positions only.
        mine = torch.empty_like(shares[0])
        torch.distributed.reduce_scatter_tensor(mine, shares.flatten(0, 1), group=context)
        return mine, None


def gather_features(local: Tensor, num_images: int, groups: ImageGroups) -> Tensor:
    """Gather the features of all images of a micro-batch.

    Args:
        local: float[share, p, h]; this rank's `ImageShare`.
        num_images: images of the whole micro-batch.
        groups: the ranks that share them.

    Returns:
        float[num_images, p, h] in the order of the batch.
    """
    size = groups.all.size()
    if size == 1 or num_images == 0:
        return local
    share = ImageShare(size=size).images_per_rank(num_images)
    if local.size(0) < share:
        local = torch.cat([local, local.new_zeros((share - local.size(0), *local.shape[1:]))])
    return _GatherFeatures.apply(local, groups)[:num_images]
