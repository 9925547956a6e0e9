"""Memory for large tensors, used again once nothing refers to them: fresh pages can take longer than a copy."""

import mmap
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_SMALL_BYTES = 1 << 20
_MOST_TIMES = 4
"""As large as what is asked for may be what is given: a small tensor does not hold the memory of a large one."""


class ReusedMemory:
    """Regions of memory that no tensor uses."""

    def __init__(self) -> None:
        # Changed by single operations only: a region comes back in whatever thread lets go of its tensor.
        self._free: dict[int, np.ndarray] = {}

    def take(self, num_bytes: int) -> np.ndarray:
        """Return uint8[num_bytes] of unknown values that begin at a page; the memory comes back with its last view."""
        region = self._find(num_bytes)
        view = region[:num_bytes]
        weakref.finalize(view, self._free.__setitem__, id(region), region).atexit = False
        return view

    def _find(self, num_bytes: int) -> np.ndarray:
        fitting = sorted(
            (region.nbytes, key)
            for key, region in list(self._free.items())
            if num_bytes <= region.nbytes <= _MOST_TIMES * num_bytes
        )
        for _, key in fitting:
            if (region := self._free.pop(key, None)) is not None:  # None: another thread was faster
                return region
        for key, region in list(self._free.items()):
            if region.nbytes < num_bytes:  # of a smaller tensor than those that are made now
                self._free.pop(key, None)
        return np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)


_MEMORY = ReusedMemory()


def take_memory(num_bytes: int) -> Tensor:
    """Return uint8[num_bytes] of unknown values that begin at a page.

    Once no tensor uses the memory any more, it is used again.
    """
    return torch.from_numpy(_MEMORY.take(max(num_bytes, 1)))[:num_bytes]


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Return a tensor of unknown values, as `torch.empty` does; a large one on the CPU in reused memory."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if (device is not None and device.type != "cpu") or num_bytes < _SMALL_BYTES:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return take_memory(num_bytes).view(dtype).view(tuple(shape))
