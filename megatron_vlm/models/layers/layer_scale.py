"""LayerScale: a learned factor for each channel of what a layer adds to its input."""

from collections.abc import Callable

import torch
from torch import Tensor

OutputAndBias = tuple[Tensor, Tensor | None]


class LayerScale(torch.nn.Module):
    """Takes the place of megatron-core's bias-dropout-add in a layer spec, and scales before it adds; no dropout.

    Args:
        hidden_size: channels.
        init: initial value of the factors.
        dtype: of the weights.

    Source: CaiT, arXiv:2103.17239, section 2.
    """

    def __init__(self, hidden_size: int, init: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((hidden_size,), init, dtype=dtype))

    def forward(self, training: bool, fused: bool) -> Callable[[OutputAndBias, Tensor, float], Tensor]:
        """Return the function that adds the output of attention or MLP to the residual stream."""
        return self._add

    def _add(self, output_and_bias: OutputAndBias, residual: Tensor, dropout: float) -> Tensor:
        output, bias = output_and_bias
        return torch.addcmul(residual, output if bias is None else output + bias, self.weight)
