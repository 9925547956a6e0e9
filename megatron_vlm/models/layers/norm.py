"""torch's norms for megatron-core's specs, correct under sequence parallelism."""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

ProcessGroup = torch.distributed.ProcessGroup

# Half precision needs float32 in between.
_SINGLE_OR_DOUBLE = (torch.float32, torch.float64)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last axis, float[t, h]; keeps x and one factor a row.

    With a group, its ranks hold equal parts of the axis. Half precision is computed in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, group: ProcessGroup | None) -> Tensor:
        ctx.group, ctx.width = group, x.size(-1) * (1 if group is None else group.size())
        wide = _widen(x)
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        factor = _sum_over(square, group).div_(ctx.width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        return (wide * factor).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[override]
        x, weight, factor = ctx.saved_tensors
        grad, wide_weight, normalised = _widen(grad), _widen(weight), _widen(x) * factor
        product = grad * normalised
        # Of each row: the part of the gradient that would only change its length.
        along = _sum_over(torch.mv(product, wide_weight), ctx.group).div_(ctx.width).neg_().unsqueeze(-1)
        weight_grad = product.sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        x_grad = torch.mul(grad, wide_weight, out=product).addcmul_(normalised, along).mul_(factor)
        return x_grad.to(x.dtype), weight_grad, None, None


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype in _SINGLE_OR_DOUBLE else x.float()


def _sum_over(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Add up in place what the ranks of a group have."""
    if group is not None:
        torch.distributed.all_reduce(x, group=group)
    return x


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, which on the CPU is a chain of operations in both directions, in fewer passes."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise float[..., h]."""
        if x.is_cuda or self.weight is None or self.eps is None or x.dtype not in _SINGLE_OR_DOUBLE:
            return super().forward(x)
        normalised: Tensor = _RMSNorm.apply(x.flatten(0, -2), self.weight, self.eps, None)
        return normalised.view(x.shape)


class NormOfAllHeads(RMSNorm):
    """RMSNorm of queries or keys over all heads together, for a spec's `q_layernorm` and `k_layernorm`.

    megatron-core's normalises each head for itself.

    Args:
        config: of the layer.
        hidden_size: channels of a head.
        eps: added to the mean square.
        tp_group: ranks that the heads are split over.

    Source: InternVL, arXiv:2312.14238, section 3.2.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, tp_group: ProcessGroup) -> None:
        width = config.num_attention_heads // tp_group.size() * hidden_size
        super().__init__(width, eps=eps, dtype=config.params_dtype)
        self.tp_group = tp_group
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise float[..., heads, channels]; heads of this rank."""
        heads = x.flatten(-2)
        if self.tp_group.size() == 1:
            return super().forward(heads).view(x.shape)
        normalised: Tensor = _RMSNorm.apply(heads.flatten(0, -2), self.weight, self.eps, self.tp_group)
        return normalised.view(x.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the state for a checkpoint, which stores the weight of all heads."""
        state, axes = self.state_dict(prefix="", keep_vars=True), {"weight": 0}
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


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
