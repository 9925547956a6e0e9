"""Install the fake device: torch's CUDA calls, and what torch does otherwise on a GPU than on its CPU build.

Call `guard.load_guard` before torch is imported, and `install` before megatron-core is.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from megatron_vlm.platform import device, host
from megatron_vlm.platform.fake_device import kernels
from megatron_vlm.platform.fake_device.watch import DeviceWatch, active_watch

DEVICE = torch.device("cuda", 0)
NAME = "a GPU that is not there"
_CAPABILITY = (8, 0)
"""The oldest one whose memory the examples need: what runs on it runs on the later ones."""

_COMPILED_PACKAGES = ("transformer_engine", "apex", "amp_C", "flash_attn", "flash_attn_2_cuda", "flash_attn_3")
"""Their kernels read memory that a fake tensor does not have; megatron-core uses them wherever they import."""

_FIRST_USER = "megatron.core.tensor_parallel.random"
_installed = False


def install() -> None:
    """Make this process one of the fake device; there is no way back.

    Raises:
        RuntimeError: megatron-core is already imported; it binds some of the names at import.
    """
    global _installed
    if _installed:
        return
    if _FIRST_USER in sys.modules:
        raise RuntimeError("fake_device.install() must run before megatron.core is imported")
    device.quieten()
    for name in _COMPILED_PACKAGES:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it fails, as if it were not installed
    # torch has its compiler wherever it is built for CUDA on Linux; here the parts to compile run as they are.
    device.can_compile_kernels = lambda: True
    _serve_cuda_module()
    _serve_modules_and_tensors()
    _serve_distributed()
    kernels.install()
    # There is no device for the engine to start a thread for.
    torch.autograd.set_multithreading_enabled(False)
    _installed = True


class _FakeMode(FakeTensorMode):
    """Fake tensors that never ask for a real device, although torch.cuda.is_available() says that there is one."""

    @property
    def avoid_device_init(self) -> bool:
        return True


@contextmanager
def fake_device() -> Iterator[DeviceWatch]:
    """Compute on the fake device in the body; yields what watches it.

    Tensors that the body makes have no values. Those made before it, or `on_host`, stay real as long as they are on the
    host and are combined with each other alone.
    """
    watch = DeviceWatch()
    with _FakeMode(allow_non_fake_inputs=True), watch:
        yield watch


@contextmanager
def on_host() -> Iterator[None]:
    """Compute on the host in the body, with real tensors."""
    with _disable_current_modes():
        yield


class _Event(host.Event):
    def synchronize(self) -> None:
        _synchronize()


class _Stream(host.Stream):
    def synchronize(self) -> None:
        _synchronize()


def _synchronize(*args: Any, **kwargs: Any) -> None:
    watch = active_watch()
    if watch is not None:
        watch.note_wait("synchronize")


def _serve_cuda_module() -> None:
    answers = {
        **host.cuda_answers(DEVICE),
        "Event": _Event,
        "Stream": _Stream,
        "current_stream": lambda *args, **kwargs: _Stream(),
        "default_stream": lambda *args, **kwargs: _Stream(),
        "get_device_capability": lambda *args: _CAPABILITY,
        "get_device_name": lambda *args: NAME,
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "set_rng_state": lambda state, *args, **kwargs: None,
        "synchronize": _synchronize,
    }
    host.replace_cuda_names(answers)


def _serve_modules_and_tensors() -> None:
    make = torch.tensor

    def tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        # torch reads tensors in a list by a way that no mode sees.
        return make(_values(data), *args, **kwargs)

    torch.tensor = tensor
    torch.nn.Module._apply = _convert_module  # type: ignore[method-assign]
    FakeTensor.tolist = _to_list  # type: ignore[method-assign]


def _values(data: Any) -> Any:
    if isinstance(data, (list, tuple)):
        return [_values(one) for one in data]
    return data.item() if isinstance(data, FakeTensor) else data


def _to_list(self: FakeTensor) -> Any:
    watch = active_watch()
    if watch is None:
        raise RuntimeError("a fake tensor has no values outside of fake_device()")
    return watch.read(self)[0].tolist()


def _convert_module(self: torch.nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Do what Module._apply does; torch can change no fake parameter in place, so that new ones take their places."""
    if recurse:
        for module in self.children():
            module._apply(convert)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            self._parameters[name] = _convert_parameter(parameter, convert)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = convert(buffer)
    return self


def _convert_parameter(parameter: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    if hasattr(parameter, "_converted"):  # it is shared with a module that came before
        return parameter._converted
    with torch.no_grad():
        converted = convert(parameter)
    if converted is parameter:
        return parameter
    new = torch.nn.Parameter(converted, requires_grad=parameter.requires_grad)
    for name, value in parameter.__dict__.items():
        new.__dict__.setdefault(name, value)  # marks of megatron-core; a fake tensor's own facts stay
    parameter._converted = new
    return new


def _serve_distributed() -> None:
    distributed: Any = torch.distributed

    def all_gather_object(box: list, value: Any, group: Any = None) -> None:
        _note_object("all_gather_object", group)
        box[:] = [value] * len(box)

    def broadcast_object_list(box: list, src: Any = None, group: Any = None, *args: Any, **kwargs: Any) -> None:
        _note_object("broadcast_object_list", group)

    distributed.all_gather_object = all_gather_object
    distributed.broadcast_object_list = broadcast_object_list
    for module in (distributed, distributed.distributed_c10d):
        module._coalescing_manager = _one_by_one


def _note_object(op: str, group: Any) -> None:
    watch = active_watch()
    if watch is not None:
        watch.collectives.note_object(op, group)


class _Done:
    def wait(self) -> None:
        return None


@contextmanager
def _one_by_one(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[_Done]:
    """Issue the collectives of the body as they come: c10d's operators for several at once take no fake tensors."""
    yield _Done()
