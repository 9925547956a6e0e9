"""Bytes of all storages on the fake device, from their birth to their death."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_BLOCK = 512
"""torch's allocator rounds every request up to it [bytes]."""


def rounded(size: int) -> int:
    """Return the bytes that torch's allocator hands out for a request of `size` bytes."""
    return -(-size // _BLOCK) * _BLOCK


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of all tensors, each storage once."""
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(rounded(storage.nbytes()) for storage in storages.values())


class DeviceMemory:
    """Counts as torch's caching allocator would, without its fragmentation.

    The highest sum is kept for each phase of the program; `during` says which phase runs.
    """

    def __init__(self) -> None:
        self.now = 0
        self.peaks: dict[str, int] = {}
        """By phase [bytes]."""
        self._phase = "start"

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Name what the program does in the body."""
        before, self._phase = self._phase, phase
        self._note_peak()
        try:
            yield
        finally:
            self._phase = before

    def see(self, tensor: Tensor) -> None:
        """Count the storage of a tensor on the device, unless it is counted already."""
        storage = tensor.untyped_storage()
        if hasattr(storage, "_rehearsed"):
            return
        storage._rehearsed = True  # type: ignore[attr-defined]
        size = rounded(storage.nbytes())
        self.now += size
        weakref.finalize(storage, self._forget, size)
        self._note_peak()

    def _note_peak(self) -> None:
        if self.now > self.peaks.get(self._phase, 0):
            self.peaks[self._phase] = self.now

    def _forget(self, size: int) -> None:
        self.now -= size

    @property
    def peak(self) -> int:
        """The highest sum of all phases [bytes]."""
        return max(self.peaks.values(), default=0)


def is_on_device(value: object) -> bool:
    """Return whether a value is a tensor of the fake device."""
    return isinstance(value, torch._subclasses.FakeTensor) and value.fake_device.type == "cuda"
