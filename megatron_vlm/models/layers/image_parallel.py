"""Data parallelism of the vision parts over the tensor-parallel group.

Each tensor-parallel rank encodes its own share of the images of a micro-batch, and the features are gathered. Every
rank holds the whole tower and projection, so they contain no collectives and any number of heads works.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_vlm.parallel.slicing import ImageShare

ProcessGroup = torch.distributed.ProcessGroup


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
        # Every rank has the full gradient and takes its slice. The gradients of replicated parameters are averaged over
        # the group later, but should be summed over all images: hence the factor.
        return grad.chunk(size)[rank] * size, None


def gather_features(local: Tensor, num_images: int, group: ProcessGroup) -> Tensor:
    """Gather the features of all images of a micro-batch.

    Args:
        local: float[share, p, h]; this rank's `ImageShare`.
        num_images: images of the whole micro-batch.
        group: the tensor-parallel ranks.

    Returns:
        float[num_images, p, h] in the order of the batch.
    """
    if group.size() == 1 or num_images == 0:
        return local
    share = ImageShare(size=group.size()).images_per_rank(num_images)
    if local.size(0) < share:
        local = torch.cat([local, local.new_zeros((share - local.size(0), *local.shape[1:]))])
    return _GatherFeatures.apply(local, group)[:num_images]
