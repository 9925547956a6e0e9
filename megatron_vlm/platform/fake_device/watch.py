"""See every operation on the fake device: storages, waits of the host, collectives; answer what the host reads."""

from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from megatron_vlm.platform.fake_device.callers import caller
from megatron_vlm.platform.fake_device.collectives import Collectives
from megatron_vlm.platform.fake_device.events import HostWait
from megatron_vlm.platform.fake_device.memory import DeviceMemory

_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_MOST_KNOWN = 4096
"""Elements up to which the values of an integer tensor are followed."""

_watches: list["DeviceWatch"] = []


def active_watch() -> "DeviceWatch | None":
    """Return the watch of the innermost `fake_device()`; None outside of one."""
    return _watches[-1] if _watches else None


class DeviceWatch(TorchDispatchMode):
    """Records what a program does on the fake device.

    Small integer tensors that come from the host keep their values, and so does what is computed from them: the host
    may read them, like the borders of samples. Every other value that the host reads is answered by ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory = DeviceMemory()
        self.collectives = Collectives()
        self.waits: Counter[tuple[HostWait, int]] = Counter()
        """Number of waits, by the wait and the `position` at which it happened."""
        self.position = 0
        """A number that the user of the watch moves on, such as micro-batches begun."""

    def __enter__(self) -> "DeviceWatch":
        _watches.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _watches.remove(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Run one operation and record what it did."""
        kwargs = kwargs or {}
        if func in _READS:
            return self._answer(func, args)
        if func.namespace == "c10d":
            self.collectives.note(func._schema.name.partition("::")[2], args)
        if not types and _stays_on_host(args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in _COPIES:
            self._see_copy(func, args, kwargs, out)
        if isinstance(out, FakeTensor):
            self._see(func, args, kwargs, out)
        elif isinstance(out, (tuple, list)):
            for one in out:
                if isinstance(one, FakeTensor) and one.fake_device.type == "cuda":
                    self.memory.see(one)
        return out

    def start_recording(self) -> None:
        """Forget waits and collectives so far; the memory goes on."""
        self.position = 0
        self.waits.clear()
        self.collectives.calls.clear()

    def note_wait(self, kind: Literal["read", "copy", "synchronize"]) -> None:
        """Record that the host waits for the device here."""
        self.waits[HostWait(kind, caller()), self.position] += 1

    def read(self, *tensors: FakeTensor) -> list[Tensor]:
        """Return what the host reads of fake tensors at once: their values where they are known, else ones."""
        if any(tensor.fake_device.type == "cuda" for tensor in tensors):
            self.note_wait("read")
        with _disable_current_modes():
            return [_known_or_ones(tensor) for tensor in tensors]

    def _answer(self, func: Any, args: tuple) -> Any:
        fakes = [value for value in args if isinstance(value, FakeTensor)]
        values = iter(self.read(*fakes))
        with unset_fake_temporarily():
            return func(*(next(values) if isinstance(value, FakeTensor) else value for value in args))

    def _see(self, func: Any, args: tuple, kwargs: dict, out: FakeTensor) -> None:
        if out.fake_device.type == "cuda":
            self.memory.see(out)
        if not out.dtype.is_floating_point and out.numel() <= _MOST_KNOWN:
            _follow_values(func, args, kwargs, out)

    def _see_copy(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        source = args[1] if func is torch.ops.aten.copy_.default else args[0]
        flags = args[2:] if func is torch.ops.aten.copy_.default else ()
        crosses = source.device.type != out.device.type
        if crosses and not kwargs.get("non_blocking", flags[0] if flags else False):
            self.note_wait("copy")


def _known_or_ones(tensor: FakeTensor) -> Tensor:
    known = getattr(tensor, "_known", None)
    return torch.ones(tensor.shape, dtype=tensor.dtype) if known is None else known.clone()


def _stays_on_host(args: tuple, kwargs: dict) -> bool:
    """Return whether an operation combines real tensors and leaves the result on the host."""
    device = kwargs.get("device")
    if device is not None and torch.device(device).type != "cpu":
        return False
    return any(_holds_tensor(value) for value in args)


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(map(_holds_tensor, value)))


def _follow_values(func: Any, args: tuple, kwargs: dict, out: FakeTensor) -> None:
    """Compute the values of a small integer tensor whose inputs are all known."""
    if func._schema.is_mutable:
        if hasattr(out, "_known"):
            del out._known
        return
    tensors: list[Tensor] = []
    tree_map_only(Tensor, tensors.append, (args, kwargs))
    if not tensors or any(isinstance(x, FakeTensor) and not hasattr(x, "_known") for x in tensors):
        return
    real_args, real_kwargs = tree_map_only(FakeTensor, lambda x: x._known, (args, kwargs))
    if "device" in real_kwargs:
        real_kwargs["device"] = "cpu"
    with unset_fake_temporarily():
        out._known = func(*real_args, **real_kwargs)  # type: ignore[attr-defined]
