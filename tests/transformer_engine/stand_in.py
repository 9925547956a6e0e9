"""Let the real transformer-engine be imported, and its modules built on the CPU, on a machine without a GPU.

Its modules ask the driver for the type of the GPU at import, and for a GPU in their constructor; nothing else of it is
changed. Whatever starts a kernel fails: no forward pass, and of the optimizer only `tests.transformer_engine.kernels`.
"""

import os
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import torch

AMPERE, HOPPER = (8, 0), (9, 0)
_gpu = SimpleNamespace(capability=HOPPER)


def install() -> None:
    """Stand in for a GPU of capability 9.0 and import transformer-engine; may be called again."""
    from megatron_vlm.platform.device import prepare_process

    # The library looks there for the libraries that torch's build for CUDA brings.
    os.environ.setdefault("CUDA_HOME", str(Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"))
    prepare_process()
    torch.cuda.get_device_capability = lambda device=None: _gpu.capability
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(
        major=_gpu.capability[0], minor=_gpu.capability[1], name="stand-in", multi_processor_count=132
    )
    import transformer_engine.pytorch  # noqa: F401  # before a GPU seems to be there: it would ask the driver

    set_gpu(True)


def set_gpu(is_there: bool) -> None:
    """Say whether there is a GPU; torch's AdamW would ask the driver for it."""
    torch.cuda.is_available = lambda: is_there


def set_capability(capability: tuple[int, int]) -> None:
    """Set what the GPU says it is."""
    from transformer_engine.pytorch import utils

    _gpu.capability = capability
    utils._get_device_compute_capability.cache_clear()
