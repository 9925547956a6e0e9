"""Cross-entropy over a vocabulary that one rank holds whole."""

from typing import Any

import torch
from torch import Tensor


class _CrossEntropy(torch.autograd.Function):
    """Keeps the log-probabilities, which the backward pass turns into the gradient in place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        ctx.save_for_backward(log_probabilities, labels)
        ctx.dtype = logits.dtype
        return -log_probabilities.gather(-1, labels[..., None]).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        log_probabilities, labels = ctx.saved_tensors
        logits_grad = log_probabilities.exp_()
        logits_grad.scatter_add_(-1, labels[..., None], torch.full_like(grad, -1.0)[..., None])
        return logits_grad.mul_(grad[..., None]).to(ctx.dtype), None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each label, in float32.

    Its backward pass can run only once, because it overwrites what it needs.

    Args:
        logits: float[..., vocabulary].
        labels: int64[...].
    """
    losses: Tensor = _CrossEntropy.apply(logits, labels)
    return losses
