"""megatron-core's parallel linear layers, with the weight gradient added to the gradient buffer by the product itself.

megatron-core does so only with an extension of apex. Its other way makes the gradient of each micro-batch as a tensor
of its own, which is then added to the buffer: two more passes over memory for every weight.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

ProcessGroup = torch.distributed.ProcessGroup


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias, and the communication of a column-parallel layer around it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reduces_gradient: bool,
        gathers_input: bool,
        group: ProcessGroup,
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.reduces_gradient, ctx.gathers_input, ctx.group = reduces_gradient, gathers_input, group
        if gathers_input:
            x, gathering = _gather(x, group)
            gathering.wait()
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        # Communication runs beside the products: the gather beside the first one, the reduction beside the second one.
        gathering = None
        if needs_weight and ctx.gathers_input:
            x, gathering = _gather(x, ctx.group)
        grad_x, reducing = grad.matmul(weight) if needs_x else None, None
        if grad_x is not None and ctx.gathers_input:
            grad_x, reducing = _reduce_scatter(grad_x, ctx.group)
        elif grad_x is not None and ctx.reduces_gradient:
            reducing = torch.distributed.all_reduce(grad_x, group=ctx.group, async_op=True)
        if gathering is not None:
            gathering.wait()
        rows = grad.flatten(0, -2)
        grad_weight = _weight_gradient(weight, rows, x.flatten(0, -2)) if needs_weight else None
        grad_bias = rows.sum(dim=0) if needs_bias else None
        if reducing is not None:
            reducing.wait()
        return grad_x, grad_weight, grad_bias, None, None, None


def _gather(x: Tensor, group: ProcessGroup) -> tuple[Tensor, Any]:
    gathered = x.new_empty((group.size() * x.size(0), *x.shape[1:]))
    return gathered, torch.distributed.all_gather_into_tensor(gathered, x.contiguous(), group=group, async_op=True)


def _reduce_scatter(x: Tensor, group: ProcessGroup) -> tuple[Tensor, Any]:
    share = x.new_empty((x.size(0) // group.size(), *x.shape[1:]))
    return share, torch.distributed.reduce_scatter_tensor(share, x.contiguous(), group=group, async_op=True)


def _weight_gradient(weight: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """Add the gradient of a weight to its buffer if it has one of its own dtype, else return it.

    Args:
        weight: float[n, k]; `main_grad` is its part of megatron-core's gradient buffer.
        grad: float[t, n], of the output.
        x: float[t, k], the input.
    """
    buffer = getattr(weight, "main_grad", None)
    if buffer is None or buffer.dtype != grad.dtype:
        return grad.t().mm(x)
    buffer.addmm_(grad.t(), x)
    # megatron-core's hook, which starts the reduction of gradients, wants to see a gradient and then does not add it.
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


def local_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T of this rank, float[t, n], for weights that are used nowhere else; nothing is exchanged.

    Args:
        x: float[t, k]; t may be 0.
        weight: float[n, k].
    """
    product: Tensor = _Linear.apply(x, weight, None, False, False, None)  # without exchange, no group
    return product


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*weights)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, *(_no_gradient(weight) for weight in ctx.saved_tensors)


def without_gradient(x: Tensor, *weights: Tensor) -> Tensor:
    """Return `x`; the backward pass gives the weights, which were not used, gradients of zero."""
    out: Tensor = _WithoutGradient.apply(x, *weights)
    return out


def _no_gradient(weight: Tensor) -> Tensor | None:
    if not weight.requires_grad:
        return None
    if getattr(weight, "main_grad", None) is None:
        return torch.zeros_like(weight)
    # As in `_weight_gradient`: megatron-core's hook wants to see a gradient and does not add it.
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


class ColumnLinear(ColumnParallelLinear):
    """A column-parallel layer; its weight must not be used anywhere else."""

    def _forward_impl(
        self,
        input: Tensor,  # noqa: A002 -- megatron-core passes it by this name
        weight: Tensor,
        bias: Tensor | None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: ProcessGroup,
        **unused: Any,
    ) -> Tensor:
        return _Linear.apply(input, weight, bias, allreduce_dgrad, sequence_parallel, tp_group)

    @classmethod
    def in_place_of(cls, layer: ColumnParallelLinear) -> "ColumnLinear":
        """Return a layer with the parameters and settings of `layer`, for parts that megatron-core builds itself."""
        replacement = cls(
            layer.input_size,
            layer.output_size,
            config=layer.config,
            init_method=torch.nn.init.zeros_,
            bias=False,
            gather_output=layer.gather_output,
            skip_bias_add=layer.skip_bias_add,
            skip_weight_param_allocation=True,
            disable_grad_reduce=layer.disable_grad_reduce,
            tp_group=layer.tp_group,
        )
        replacement.weight, replacement.bias = layer.weight, layer.bias
        return replacement


class ColumnLinearWithoutBias(ColumnLinear):
    """A column-parallel layer without a bias in a part whose other layers have one: megatron-core has one switch."""

    def __init__(self, *args: Any, bias: bool, **settings: Any) -> None:
        super().__init__(*args, bias=False, **settings)


class RowLinear(RowParallelLinear):
    """A row-parallel layer; its weight must not be used anywhere else."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **unused: Any) -> Tensor:  # noqa: A002
        return _Linear.apply(input, weight, bias, False, False, self.tp_group)
