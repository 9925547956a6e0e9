"""Which GPUs this process may use, and what they can do, without importing torch."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
"""Dense BF16 peak by NVIDIA's data sheets, by a part of the device's name [FLOP/s]."""

_HIDDEN = {"", "-1", "NoDevFiles"}


def count_visible_gpus(environment: Mapping[str, str], device_folder: Path = Path("/dev")) -> int:
    """Return the number of NVIDIA GPUs that a worker started with `environment` sees.

    Args:
        environment: `CUDA_VISIBLE_DEVICES` is read from it.
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
    """Ask nvidia-smi where the driver shows no device files of its own (WSL)."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(1 for line in listing.splitlines() if line.startswith("GPU "))
