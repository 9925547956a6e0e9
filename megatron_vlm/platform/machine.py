"""The cores and GPUs of this machine, found without importing torch, and whether a configuration can run on it."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from megatron_vlm.config import ConfigError, TrainConfig
from megatron_vlm.config.hooks import HookConfig

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
"""Dense BF16 peak from NVIDIA's data sheets, by a substring of the device name [FLOP/s]."""

_HIDDEN = {"", "-1", "NoDevFiles"}


def count_cores() -> int:
    """Return how many cores this process may use; if a batch system bound it to some, only those count."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_visible_gpus(environment: Mapping[str, str], device_folder: Path = Path("/dev")) -> int:
    """Return the number of NVIDIA GPUs that a worker started with `environment` sees.

    Args:
        environment: of the worker; `CUDA_VISIBLE_DEVICES` is read from it.
        device_folder: where the driver's device files are.
    """
    present = sum(1 for path in device_folder.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    if not present:
        present = _count_by_driver_tool()
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not present:
        return present
    return 0 if visible.strip() in _HIDDEN else len(visible.split(","))


def _count_by_driver_tool() -> int:
    """Ask nvidia-smi if the driver has no device files (WSL)."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(1 for line in listing.splitlines() if line.startswith("GPU "))


def check_requirements(config: TrainConfig, *, num_gpus: int, num_workers: int) -> None:
    """Check that this node can run the settings.

    Args:
        config: the settings of the run.
        num_gpus: GPUs that the ranks of this node see.
        num_workers: ranks that this node starts.

    Raises:
        ConfigError: FP8 or transformer-engine without the library or a GPU, a hook without its package, or more
            ranks than GPUs.
    """
    if config.training.fp8 is not None:
        # Without the library, megatron-core silently computes in full precision.
        _check_transformer_engine(f"training.fp8={config.training.fp8}", "remove training.fp8", num_gpus)
    if config.model.backend == "transformer_engine":
        _check_transformer_engine("model.backend=transformer_engine", "set model.backend=auto", num_gpus)
    for hook in config.training.hooks:
        check_package(hook)
    if num_gpus and num_workers > num_gpus:
        raise ConfigError(
            f"{num_workers} ranks on a node with {num_gpus} visible GPUs",
            fix=f"use --nproc-per-node {num_gpus}, or CUDA_VISIBLE_DEVICES= to run on the CPU",
        )


def check_package(hook: HookConfig) -> None:
    """Check that the optional package of a hook is installed.

    Raises:
        ConfigError: the package is missing.
    """
    if hook.package is not None and importlib.util.find_spec(hook.package) is None:
        raise ConfigError(
            f"training.hooks names {hook.type}, which needs {hook.package}; it is not installed",
            fix=f"pip install 'megatron_vlm[{hook.package}]', or remove the hook",
        )


def _check_transformer_engine(setting: str, way_out: str, num_gpus: int) -> None:
    if importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            f"{setting} needs transformer-engine, which is not installed",
            fix=f"pip install 'megatron_vlm[gpu]' on a GPU machine, or {way_out}",
        )
    if not num_gpus:
        raise ConfigError(f"{setting} needs a GPU, and none is visible", fix=f"run it on a GPU machine, or {way_out}")
