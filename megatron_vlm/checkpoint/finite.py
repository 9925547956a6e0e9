"""No checkpoint holds weights or moments that are not finite: an update can make them so from finite gradients."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_vlm.config import NumericError


@torch.no_grad()
def check_finite(tensors: Mapping[str, Tensor], iteration: int) -> None:
    """Look at all values that this rank is going to save, where they are.

    The largest magnitude of each tensor takes one pass over memory; the host waits once for the device.

    Args:
        tensors: weights and moments, by name.
        iteration: named in the error.

    Raises:
        NumericError: names the first tensor with a value that is not finite.
    """
    # Quantized weights have a type of their own; the optimizer has their values in float32.
    looked_at = {
        name: values.detach()
        for name, values in tensors.items()
        if type(values.detach()) is Tensor and values.numel() and values.is_floating_point()
    }
    if not looked_at:
        return
    norms = torch._foreach_norm(list(looked_at.values()), torch.inf)
    is_finite = torch.stack([norm.float() for norm in norms]).isfinite().tolist()
    for name, is_good in zip(looked_at, is_finite, strict=True):
        if not is_good:
            raise NumericError(
                f"{name} is not finite after iteration {iteration}, so no checkpoint is saved",
                fix="resume from the last checkpoint with a lower learning rate",
            )
