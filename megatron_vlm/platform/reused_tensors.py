"""Tensors in memory that is used again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vlm.platform.reused_memory import take_memory

_SMALL_BYTES = 1 << 20


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Return a tensor of unknown values, as `torch.empty` does; a large one on the CPU in reused memory."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if (device is not None and device.type != "cpu") or num_bytes < _SMALL_BYTES:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return torch.from_numpy(take_memory(num_bytes)).view(dtype).view(tuple(shape))
