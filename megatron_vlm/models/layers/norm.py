"""torch's norms for megatron-core's specs, correct under sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

# Half precision needs float32 in between.
_SINGLE_OR_DOUBLE = (torch.float32, torch.float64)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last axis, float[t, h]; keeps x and one factor a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1))
        factor = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        return (x * factor).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        x, weight, factor = ctx.saved_tensors
        normalised = x * factor
        product = grad * normalised
        # Of each row: the part of the gradient that would only change its length.
        along = torch.mv(product, weight).div_(x.size(-1)).neg_().unsqueeze(-1)
        weight_grad = product.sum(dim=0) if ctx.needs_input_grad[1] else None
        x_grad = torch.mul(grad, weight, out=product).addcmul_(normalised, along).mul_(factor)
        return x_grad, weight_grad, None


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, which on the CPU is a chain of operations in both directions, in fewer passes."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise float[..., h]."""
        if x.is_cuda or self.weight is None or self.eps is None or x.dtype not in _SINGLE_OR_DOUBLE:
            return super().forward(x)
        normalised: Tensor = _RMSNorm.apply(x.flatten(0, -2), self.weight, self.eps)
        return normalised.view(x.shape)


class NormOfAllHeads(RMSNorm):
    """RMSNorm of queries or keys over all heads together, for a spec's `q_layernorm` and `k_layernorm`.

    megatron-core's normalises each head for itself. Every head must be on this rank, as in a tower.

    Source: InternVL, arXiv:2312.14238, section 3.2.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config.num_attention_heads * hidden_size, eps=eps, dtype=config.params_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise float[..., heads, channels]."""
        return super().forward(x.flatten(-2)).view(x.shape)


_KINDS: dict[str, type[torch.nn.Module]] = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": RMSNorm}


class Norm:
    """Factory for an RMSNorm or LayerNorm, chosen by `config.normalization`.

    With sequence parallelism, each tensor-parallel rank normalises different tokens, so the gradients of the weights
    must be summed over these ranks. megatron-core's `finalize_model_grads` does this for parameters marked
    `sequence_parallel`; its own torch norm does not mark them, and therefore rejects sequence parallelism.
    """

    def __new__(  # type: ignore[misc]  # specs take a class and call it to build a module
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> torch.nn.Module:
        """Build the norm.

        Raises:
            ValueError: the config requires a norm that only transformer-engine implements.
        """
        if config.layernorm_zero_centered_gamma or config.memory_efficient_layer_norm:
            raise ValueError("zero-centred gamma and the memory-efficient norm need the transformer_engine backend")
        norm = _KINDS[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
