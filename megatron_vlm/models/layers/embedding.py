"""megatron-core's embedding, whose gradient goes straight into the gradient buffer.

The usual way fills a matrix of the size of the vocabulary with zeros, adds the few rows of a micro-batch, and adds the
whole matrix to the buffer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from torch import Tensor


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, input_ids: Tensor) -> Tensor:
        ctx.save_for_backward(weight, input_ids)
        return F.embedding(input_ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        weight, input_ids = ctx.saved_tensors
        rows, buffer = grad.flatten(0, -2), getattr(weight, "main_grad", None)
        if buffer is None:
            return torch.zeros_like(weight).index_add_(0, input_ids.flatten(), rows), None
        buffer.index_add_(0, input_ids.flatten(), rows.to(buffer.dtype))
        # megatron-core's hook wants to see a gradient, and does not add it because of this mark.
        weight.grad_added_to_main_grad = True
        return torch.empty_like(weight), None


class Embedding(VocabParallelEmbedding):
    """An embedding whose weight is used nowhere else and whole on this rank."""

    def forward(self, input_: Tensor) -> Tensor:
        """Return float[b, s, h] for int64[b, s]."""
        if not (self.weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(input_)
        embeddings: Tensor = _Embedding.apply(self.weight, input_)
        return embeddings


def accumulate_in_place(embedding: VocabParallelEmbedding) -> None:
    """Make an embedding that megatron-core has built accumulate its gradient in place, where it can.

    Args:
        embedding: used nowhere else. It stays as it is if several ranks share it, or it scatters its output to them.
    """
    if embedding.tp_group.size() == 1 and not embedding.reduce_scatter_embeddings:
        embedding.__class__ = Embedding
