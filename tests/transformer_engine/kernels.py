"""The kernels of transformer-engine's optimizer, computed by torch on the CPU; everything around them is its own."""

from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine import stand_in


def fused_adamw(
    chunk_size: int,
    overflow: Tensor,
    tensors: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Update parameters in place as AdamW does; stands in for `multi_tensor_adam`.

    torch's own fused AdamW does the arithmetic, so that a run may change from one optimizer to the other to the bit.

    Raises:
        TypeError: the step is no integer; the kernel's argument is one.
        ValueError: this is not AdamW with bias correction.
    """
    if type(step) is not int:
        raise TypeError(f"multi_tensor_adam takes an int step, not {step!r}")
    if not (decoupled and bias_correction):
        raise ValueError("only AdamW with bias correction is known here")
    gradients, parameters, averages, squares = tensors
    # The kernel of torch advances no count: it takes the number of the step that it does.
    steps = [torch.tensor(float(step)) for _ in parameters]
    torch._fused_adamw_(
        parameters,
        [gradient.to(parameter.dtype) for gradient, parameter in zip(gradients, parameters, strict=True)],
        averages,
        squares,
        [],
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def install() -> None:
    """Give FusedAdam and megatron-core's clipping these kernels; needs the stand-in."""
    import transformer_engine_torch
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    transformer_engine_torch.multi_tensor_adam = fused_adamw
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    optimizer.multi_tensor_scale_impl = utils.local_multi_tensor_scale


def prepare() -> None:
    """Make a new process like that of the tests."""
    stand_in.install()
    install()


def adam_classes() -> dict[str, dict[Any, dict[str, Any]]]:
    """Return what megatron-core's modules hold where transformer-engine is there, and where it is not."""
    import megatron.core.optimizer as chooser
    from megatron.core.optimizer import distrib_optimizer
    from transformer_engine.pytorch.optimizers import FusedAdam

    return {
        "FusedAdam": {
            chooser: {"Adam": FusedAdam, "USING_PYTORCH_OPTIMIZER": False},
            distrib_optimizer: {"Adam": FusedAdam, "HAVE_APEX_OR_TE": True, "USING_TE_OPTIMIZER": True},
        },
        "AdamW": {
            chooser: {"Adam": torch.optim.AdamW, "USING_PYTORCH_OPTIMIZER": True},
            distrib_optimizer: {"Adam": torch.optim.Adam, "HAVE_APEX_OR_TE": False, "USING_TE_OPTIMIZER": False},
        },
    }


def use_adam(name: str) -> None:
    """Be a machine with a GPU, where megatron-core takes "FusedAdam", or a host without transformer-engine: "AdamW"."""
    stand_in.set_gpu(name == "FusedAdam")
    for module, values in adam_classes()[name].items():
        for key, value in values.items():
            setattr(module, key, value)
