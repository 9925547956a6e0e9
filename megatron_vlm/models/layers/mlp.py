"""megatron-core's MLP for torch's backend, with fewer passes over memory where megatron-core has no fused kernel."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

ProcessGroup = torch.distributed.ProcessGroup


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Keeps only its input, and writes the gradients of both halves into one tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        x_grad = torch.empty_like(x)
        gate_grad, up_grad = x_grad.chunk(2, dim=-1)
        torch.mul(grad, up, out=gate_grad)
        torch.ops.aten.silu_backward(gate_grad, gate, grad_input=gate_grad)
        torch.ops.aten.silu(gate, out=up_grad)
        up_grad.mul_(grad)
        return x_grad


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * up.

    Args:
        x: float[..., 2 f]; gate, then up.

    Source: arXiv:2002.05202.
    """
    out: Tensor = _SwiGLU.apply(x)
    return out


class FusedMLP(MLP):
    """megatron-core's MLP whose SwiGLU is one operation, and whose first bias is added by the matrix product."""

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, tp_group: ProcessGroup | None) -> None:
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp_group)
        self.linear_fc1.skip_bias_add = False

    @classmethod
    def of_group(cls, submodules: MLPSubmodules, tp_group: ProcessGroup | None) -> type[MLP]:
        """Return a class for a layer spec; megatron-core passes the group of a layer only to its own MLP.

        Args:
            submodules: the two linear modules.
            tp_group: ranks that share the MLP; None: those of megatron-core's parallel state.
        """

        class OfGroup(cls):  # type: ignore[misc, valid-type]
            def __init__(self, config: TransformerConfig) -> None:
                super().__init__(config, submodules, tp_group)

        return OfGroup

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return output and bias, as megatron-core's MLP does."""
        config = self.config
        plain = config.activation_func_clamp_value is None and config.glu_linear_offset == 0.0
        is_swiglu = config.gated_linear_unit and config.activation_func is F.silu and plain
        if not is_swiglu or config.bias_activation_fusion or per_token_scale is not None:
            return super().forward(hidden_states, per_token_scale, **unused)
        intermediate, _ = self.linear_fc1(hidden_states)
        output, bias = self.linear_fc2(swiglu(intermediate))
        return output, bias
