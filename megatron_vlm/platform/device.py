"""The device of this rank, and a quiet import of megatron-core."""

import importlib.util
import os

import torch

from megatron_vlm.platform import host
from megatron_vlm.platform.log_format import silence_harmless_warnings


def prepare_process() -> torch.device:
    """Make megatron-core importable and quiet in this process; call this before importing megatron.core.

    Returns:
        The device of this rank: a GPU if there is one, else the CPU.
    """
    quieten()
    # Of each record in a file; a manifest has those of whole files, and torch's readers look at no other.
    torch.serialization.set_crc32_options(False)
    if host.install():
        return host.HOST
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def quieten() -> None:
    """Set what megatron-core warns about, and silence the warnings that users cannot act on."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    silence_harmless_warnings()


def set_deterministic(is_deterministic: bool) -> None:
    """Have torch choose algorithms that give the same bits in every run, and raise where it has none; or not.

    The backward pass of torch's flash attention follows this switch too. `launch.environment` sets what the libraries
    beside torch need.
    """
    if torch.are_deterministic_algorithms_enabled() != is_deterministic:  # the call imports torch's compiler
        torch.use_deterministic_algorithms(is_deterministic)
    if is_deterministic:
        torch.backends.cudnn.benchmark = False


def can_compile_kernels() -> bool:
    """Return whether torch.compile makes kernels for a GPU of this machine; its compiler is triton."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def distributed_backend(device: torch.device) -> str:
    """Return the name of the communication backend for `device`."""
    return "gloo" if device.type == "cpu" else "nccl"
