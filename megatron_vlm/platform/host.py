"""Serve megatron-core's CUDA calls on the CPU of a machine without a GPU.

megatron-core refers to CUDA in four ways: factories with `device="cuda"` or a device index, `tensor.cuda()`, the
streams, events and generators of `torch.cuda`, and comparisons with type names such as `torch.cuda.FloatTensor`.
`install` handles all four. Collectives, schedules, optimizer and checkpoints remain megatron-core's own, over gloo.

Only this module and `fake_device` change torch. `tests/platform/test_host_guard.py` compares the names served here with
those that the installed megatron-core uses.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

HOST = torch.device("cpu")

FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)
"""Functions of torch whose `device` argument is redirected."""

SERVED = (
    "Event",
    "Stream",
    "_lazy_call",
    "current_device",
    "current_stream",
    "default_generators",
    "default_stream",
    "device_count",
    "empty_cache",
    "get_rng_state",
    "manual_seed",
    "manual_seed_all",
    "set_device",
    "set_rng_state",
    "stream",
    "synchronize",
)
"""Attributes of torch.cuda that `install` replaces."""

_FIRST_USER = "megatron.core.tensor_parallel.random"
_installed = False


def install() -> bool:
    """Redirect torch's CUDA calls to the CPU if there is no GPU.

    Returns:
        True if the CPU serves these calls from now on, False on a machine with a GPU.

    Raises:
        RuntimeError: megatron-core is already imported; it binds some of these names at import.
    """
    global _installed
    if _installed:
        return True
    if torch.cuda.is_available():
        return False
    if _FIRST_USER in sys.modules:
        raise RuntimeError("platform.host.install() must run before megatron.core is imported")
    for name in FACTORIES:
        setattr(torch, name, _redirect_factory(getattr(torch, name)))
    replace_cuda_names(cuda_answers(HOST))
    _serve_tensor_methods()
    _installed = True
    return True


class Event:
    """An event on a device that completes everything immediately."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        return None

    def record(self, *args: Any) -> None:
        """Do nothing."""

    def wait(self, *args: Any) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Say that it has happened."""
        return True


class Stream(Event):
    """The only stream of the CPU."""

    cuda_stream = 0

    def wait_stream(self, *args: Any) -> None:
        """Do nothing."""

    def wait_event(self, *args: Any) -> None:
        """Do nothing."""

    def record_event(self, *args: Any) -> Event:
        """Return an event that has happened."""
        return Event()


class _Generators:
    """`torch.cuda.default_generators`: the CPU generator under every index."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _is_cuda(device: Any) -> bool:
    if isinstance(device, bool) or device is None:
        return False
    return isinstance(device, int) or str(device).startswith("cuda")


def _redirect_factory(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:  # most calls have none and only pay for this lookup
            if _is_cuda(kwargs["device"]):
                kwargs["device"] = HOST
            kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return redirected


def cuda_answers(device: torch.device) -> dict[str, Any]:
    """Return what stands for each name of `SERVED` where `device` is the only one."""
    # torch.manual_seed calls torch.cuda.manual_seed_all; seeding the generator directly avoids endless recursion.
    seed = torch.default_generator.manual_seed
    return {
        "Event": Event,
        "Stream": Stream,
        "_lazy_call": lambda call, **kwargs: call(),
        "current_device": lambda: device,
        "current_stream": lambda *args, **kwargs: Stream(),
        "default_generators": _Generators(),
        "default_stream": lambda *args, **kwargs: Stream(),
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "manual_seed": seed,
        "manual_seed_all": seed,
        "set_device": lambda *args: None,
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda *args, **kwargs: None,
    }


def replace_cuda_names(answers: Mapping[str, Any]) -> None:
    """Put these in the place of attributes of torch.cuda."""
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state


def _serve_tensor_methods() -> None:
    tensor = torch.Tensor
    original_to, original_type = tensor.to, tensor.type

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], (str, int, torch.device)) and _is_cuda(args[0]):
            args = (HOST, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = HOST
        return original_to(self, *args, **kwargs)

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:  # the optimizers compare with "torch.cuda.FloatTensor"
            return "torch.cuda." + original_type(self).rsplit(".", 1)[-1]
        return original_type(self, dtype, *args, **kwargs)

    tensor.cuda = stay  # type: ignore[method-assign]
    torch.nn.Module.cuda = stay  # type: ignore[method-assign,assignment]
    tensor.to = to  # type: ignore[method-assign,assignment]
    tensor.type = type_name  # type: ignore[method-assign,assignment]
