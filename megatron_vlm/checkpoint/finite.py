"""No checkpoint holds weights or moments that are not finite: an update can make them so from finite gradients."""

from collections.abc import Iterator, Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vlm.checkpoint.adam_state import MOMENTS, adams
from megatron_vlm.config import NumericError


@torch.no_grad()
def check_finite(chunks: Sequence[MegatronModule], optimizer: MegatronOptimizer, iteration: int) -> None:
    """Look at all weights and moments of this rank, on the device; all ranks call it together.

    The largest magnitude of each tensor takes one pass over memory; the host waits once.

    Args:
        chunks: the model of this rank.
        optimizer: its optimizer.
        iteration: named in the error.

    Raises:
        NumericError: a rank has a value that is not finite; every rank raises it.
    """
    largest = torch.zeros((), device=torch.cuda.current_device())
    for values in (list(_weights(chunks)), list(_optimizer_values(optimizer))):
        if values:
            # Times 0, what is not finite becomes nan, and everything else 0.
            largest = (
                largest + torch.stack([norm.float() for norm in torch._foreach_norm(values, torch.inf)]).mul(0).sum()
            )
    is_bad = largest.isnan().float()
    torch.distributed.all_reduce(is_bad)
    if num_ranks := int(is_bad):
        raise NumericError(
            f"weights or moments of the optimizer are not finite on {num_ranks} ranks after iteration {iteration}; "
            "they are not saved",
            fix="resume from the last checkpoint with a lower learning rate",
        )


def _weights(chunks: Sequence[MegatronModule]) -> Iterator[Tensor]:
    for chunk in chunks:
        # Quantized weights have a type of their own; the optimizer has their values in float32.
        yield from (weight.data for weight in chunk.parameters() if type(weight.data) is Tensor and weight.numel())


def _optimizer_values(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    for adam in adams(optimizer):
        for group in adam.param_groups:
            for weight in group["params"]:
                states = adam.state.get(weight, {})
                values = [weight.data, *(states[name] for name in MOMENTS if name in states)]
                yield from (value for value in values if type(value) is Tensor and value.numel())
