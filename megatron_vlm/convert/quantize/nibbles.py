"""Values of 4 bits in integers, the first in the lowest bits."""

import torch
from torch import Tensor


def pack_nibbles(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return integers that hold the values of the last axis, as many in each as fit.

    Args:
        values: uint8[..., n], from 0 to 15.
        dtype: of the integers.
    """
    low, high = values.unflatten(-1, (-1, 2)).unbind(-1)
    return (low | (high << 4)).view(dtype)  # the first byte is the lowest one: all machines of today


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Return the values in integers, uint8[..., n]; see `pack_nibbles`."""
    halves = packed.contiguous().view(torch.uint8)
    return torch.stack((halves & 15, halves >> 4), dim=-1).flatten(-2)
