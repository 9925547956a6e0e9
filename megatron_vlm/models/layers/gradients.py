"""How far back gradients flow in a model that is frozen in part."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor


class _EndGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor) -> Tensor:
        ctx.like = source.shape, source.dtype, source.device
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        shape, dtype, device = ctx.like
        return grad, torch.zeros(shape, dtype=dtype, device=device)


def end_gradient(x: Tensor, source: Tensor) -> Tensor:
    """Return `x`, whose gradient does not reach `source`: the backward pass gives it zeros.

    The schedules send a gradient to the previous stage in any case, and do so even if nothing learns there.
    """
    out: Tensor = _EndGradient.apply(x, source)
    return out


class RecomputedBlock(TransformerBlock):
    """A block with full recomputation whose input need not require a gradient.

    A recomputed layer whose input requires no gradient silently drops the gradients of its weights. Such an input goes
    through the layers before the first that learns, which then keep nothing, and is marked before that layer.
    """

    _rest: tuple[int, TransformerBlock] | None = None
    """Layers before the first that learns, and the block of those behind them; None if none learns. In a tuple: it is
    no submodule."""

    @classmethod
    def replace_in(cls, module: torch.nn.Module) -> None:
        """Make blocks with full recomputation inside a module blocks of this class; nothing is frozen afterwards."""
        block: Any
        for block in module.modules():
            if type(block) is TransformerBlock and block.config.recompute_granularity == "full":
                block.__class__ = cls
                block._rest = _behind_frozen(block)

    def _checkpointed_forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        if hidden_states.requires_grad or not torch.is_grad_enabled() or self._rest is None:
            return super()._checkpointed_forward(hidden_states, **options)
        num_frozen, rest = self._rest
        inputs = dict(options)
        quantizes_by_layer = inputs.pop("use_inner_quantization_context")
        for layer in self.layers[:num_frozen]:
            with get_fp8_context(self.config, layer.layer_number - 1) if quantizes_by_layer else nullcontext():
                hidden_states, _ = layer(hidden_states=hidden_states, **inputs)
        marked = hidden_states.detach().requires_grad_()
        recomputed: Tensor = rest._checkpointed_forward(marked, **options)
        return recomputed


def _behind_frozen(block: TransformerBlock) -> tuple[int, TransformerBlock] | None:
    """Return the number of layers before the first that learns, and a block of the others with the same modules."""
    learning: Sequence[int] = [
        index for index, layer in enumerate(block.layers) if any(p.requires_grad for p in layer.parameters())
    ]
    if not learning:
        return None
    rest = TransformerBlock.__new__(TransformerBlock)
    rest.__dict__.update(block.__dict__)
    rest._modules = {**block._modules, "layers": block.layers[learning[0] :]}
    rest.num_layers_per_pipeline_rank = len(block.layers) - learning[0]
    return learning[0], rest
