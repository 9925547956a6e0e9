"""The cores and GPUs of this machine, found without importing torch, and whether a configuration can run on it."""

import importlib.util
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from megatron_vlm.config import ConfigError, TrainConfig
from megatron_vlm.config.hooks import HookConfig

_HIDDEN = {"", "-1", "NoDevFiles"}
# NVIDIA's data sheets and transformer-engine's own checks.
_FP8_CAPABILITIES = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
_PACKED_TORCH = (2, 10)

logger = logging.getLogger(__name__)


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
    return sum(1 for line in _ask_driver("-L") if line.startswith("GPU "))


def find_capability() -> tuple[int, int] | None:
    """Return the highest compute capability of this machine's GPUs, as (major, minor); None if the driver is silent."""
    matches = [
        re.fullmatch(r"(\d+)\.(\d+)", line.strip())
        for line in _ask_driver("--query-gpu=compute_cap", "--format=csv,noheader")
    ]
    return max(((int(m[1]), int(m[2])) for m in matches if m), default=None)


def _ask_driver(*options: str) -> list[str]:
    """Return the lines that nvidia-smi prints; none without the tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        return subprocess.run(
            [tool, *options], capture_output=True, text=True, timeout=10, check=False
        ).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return []


def pick_backend(
    backend: Literal["auto", "torch", "transformer_engine"], *, has_gpu: bool
) -> Literal["torch", "transformer_engine"]:
    """Return the layer implementation that `model.backend` means on a machine with or without a GPU."""
    if backend != "auto":
        return backend
    is_usable = has_gpu and importlib.util.find_spec("transformer_engine") is not None
    return "transformer_engine" if is_usable else "torch"


def check_requirements(config: TrainConfig, *, num_gpus: int, num_workers: int) -> None:
    """Check that this node can run the settings, and warn if it will be slower than need be.

    Args:
        config: the settings of the run.
        num_gpus: GPUs that the ranks of this node see.
        num_workers: ranks that this node starts.

    Raises:
        ConfigError: FP8 or transformer-engine without the library or a GPU, GPUs or a torch that cannot compute them,
            a hook without its package, or more ranks than GPUs.
    """
    if config.training.fp8 is not None:
        _check_transformer_engine(f"training.fp8={config.training.fp8}", "remove training.fp8", num_gpus)
    if config.model.backend == "transformer_engine":
        _check_transformer_engine("model.backend=transformer_engine", "set model.backend=auto", num_gpus)
    check_fp8_backend(config.training.fp8, pick_backend(config.model.backend, has_gpu=num_gpus > 0))
    for hook in config.training.hooks:
        check_package(hook)
    if not num_gpus:
        return
    if num_workers > num_gpus:
        raise ConfigError(
            f"{num_workers} ranks on a node with {num_gpus} visible GPUs",
            fix=f"use --nproc-per-node {num_gpus}, or CUDA_VISIBLE_DEVICES= to run on the CPU",
        )
    capability = find_capability()
    if capability is not None:
        check_capability(config, capability)
    _check_torch_backend(config)


def check_fp8_backend(fp8: str | None, backend: str) -> None:
    """Check that FP8 has layers that compute in it.

    Args:
        fp8: as in `TrainingConfig`.
        backend: as `pick_backend` returns it.

    Raises:
        ConfigError: the layers are torch's, which megatron-core would run in bf16 without a word.
    """
    if fp8 is not None and backend != "transformer_engine":
        raise ConfigError(
            f"training.fp8={fp8} needs the layers of transformer-engine, and model.backend is {backend}",
            fix="set model.backend=transformer_engine, or remove training.fp8",
        )


def check_capability(config: TrainConfig, capability: tuple[int, int]) -> None:
    """Check that GPUs of a compute capability can run the settings.

    Raises:
        ConfigError: the FP8 recipe needs a newer GPU.
    """
    have = "{}.{}".format(*capability)
    recipe = config.training.fp8_recipe
    if config.training.fp8 is not None and capability < _FP8_CAPABILITIES[recipe]:
        need = "{}.{}".format(*_FP8_CAPABILITIES[recipe])
        raise ConfigError(
            f"training.fp8_recipe={recipe} needs GPUs of compute capability {need}, these have {have}",
            fix="remove training.fp8" if capability < (8, 9) else "set training.fp8_recipe=tensorwise",
        )


def _check_torch_backend(config: TrainConfig) -> None:
    """Check and comment on the layers of torch on a GPU."""
    if pick_backend(config.model.backend, has_gpu=True) != "torch":
        return
    found = version("torch")
    if config.training.precision == "bf16" and tuple(int(n) for n in re.findall(r"\d+", found)[:2]) < _PACKED_TORCH:
        raise ConfigError(
            f"model.backend=torch needs torch 2.10 for the attention of packed samples on a GPU, this is {found}",
            fix="install a newer torch, or transformer-engine",
        )
    if config.model.backend == "auto":
        logger.warning(
            "transformer-engine is not installed, so model.backend=auto takes torch's layers: their norms and RoPE are "
            "not fused, which is slower, and they have no FP8"
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
