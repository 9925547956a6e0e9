"""Large memory, used again once nothing refers to it: fresh pages can take longer than a copy."""

import ctypes
import mmap
import weakref

import numpy as np

_MOST_TIMES = 4
"""As large as what is asked for may be what is given: something small does not hold the memory of something large."""


class ReusedMemory:
    """Regions of memory that nothing uses."""

    def __init__(self) -> None:
        # Changed by single operations only: a region comes back in whatever thread lets go of it.
        self._free: dict[int, mmap.mmap] = {}

    def take(self, num_bytes: int) -> np.ndarray:
        """Return uint8[num_bytes] of unknown values that begin at a page; the memory comes back with its last view."""
        region = self._find(num_bytes)
        # numpy's views of a view refer to the array below it, but all of them keep what is no array.
        lent = (ctypes.c_ubyte * num_bytes).from_buffer(region)
        weakref.finalize(lent, self._free.__setitem__, id(region), region).atexit = False
        return np.frombuffer(memoryview(lent), np.uint8)

    def _find(self, num_bytes: int) -> mmap.mmap:
        fitting = sorted(
            (len(region), key)
            for key, region in list(self._free.items())
            if num_bytes <= len(region) <= _MOST_TIMES * num_bytes
        )
        for _, key in fitting:
            if (region := self._free.pop(key, None)) is not None:  # None: another thread was faster
                return region
        for key, region in list(self._free.items()):
            if len(region) < num_bytes:  # of something smaller than what is made now
                self._free.pop(key, None)
        return mmap.mmap(-1, num_bytes)


_MEMORY = ReusedMemory()


def take_memory(num_bytes: int) -> np.ndarray:
    """Return uint8[num_bytes] of unknown values that begin at a page.

    Once nothing uses the memory any more, it is used again.
    """
    return _MEMORY.take(max(num_bytes, 1))[:num_bytes]
