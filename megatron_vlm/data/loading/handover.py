"""Hand what a loader worker has made to the trainer, in memory that has no name: no kill leaves any of it behind.

torch gives each tensor shared memory of its own, with a name until the moment after: a worker that is killed before
leaves it in /dev/shm, and each tensor takes a connection to the worker.
"""

import io
import mmap
import os
import pickle
import tempfile
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64  # [bytes]


class Parcel:
    """Plain values, tensors on the CPU among them, on their way to another process, where they arrive as they were.

    It can be sent once.

    Args:
        item: the values.

    Raises:
        OSError: there is no memory, or no file descriptor, left.
    """

    def __init__(self, item: Any) -> None:
        content = io.BytesIO()
        buffers: list[pickle.PickleBuffer] = []
        _Pickler(content, protocol=5, buffer_callback=buffers.append).dump(item)
        views = [buffer.raw() for buffer in buffers]
        self._content, self._sizes = content.getvalue(), [len(view) for view in views]
        descriptor, places = _create(), _places(self._sizes)
        try:
            os.ftruncate(descriptor, places[-1])
            for place, view in zip(places, views, strict=False):
                _write(descriptor, view, place)
            self._handle = DupFd(descriptor)
        finally:
            os.close(descriptor)

    def __reduce__(self) -> tuple:
        return _open, (self._content, self._handle, self._sizes)


class _Pickler(pickle.Pickler):
    """Leaves the values of tensors, as of arrays, to whoever takes the buffers."""

    def reducer_override(self, obj: Any) -> Any:
        return (_as_tensor, (obj.numpy(),)) if isinstance(obj, Tensor) else NotImplemented


def _create() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("micro-batch")
    with tempfile.TemporaryFile() as file:  # elsewhere than on Linux
        return os.dup(file.fileno())


def _open(content: bytes, handle: Any, sizes: Sequence[int]) -> Any:
    """Return the item of a parcel; its tensors lie in the shared memory, which is free once they are."""
    descriptor, places = handle.detach(), _places(sizes)
    try:
        memory = memoryview(mmap.mmap(descriptor, places[-1]))
    finally:
        os.close(descriptor)
    return pickle.loads(content, buffers=[memory[at : at + size] for at, size in zip(places, sizes, strict=False)])


def _places(sizes: Sequence[int]) -> list[int]:
    """Return where each buffer begins, and the size of the whole, which is not empty."""
    places = [0]
    for size in sizes:
        places.append(places[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return [*places[:-1], max(places[-1], _ALIGNMENT)]


def _write(descriptor: int, view: memoryview, place: int) -> None:
    while len(view):
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written


def _as_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)
