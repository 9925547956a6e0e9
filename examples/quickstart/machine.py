"""Where and with what a run was made."""

import importlib.metadata
import os
import platform

import psutil

from megatron_vlm.config import TrainConfig
from quickstart.stages import count_processes


def describe_machine(config: TrainConfig) -> dict[str, str]:
    """Return processor, memory, layout of the training processes, Python and package versions, as text."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "transformers")}
    parallel = config.parallel
    memory = psutil.virtual_memory().total / 2**30
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB",
        "processes": f"{count_processes(config)}: tensor parallel {parallel.tensor_model_parallel_size} x "
        f"pipeline parallel {parallel.pipeline_model_parallel_size}, sequence parallel, over gloo",
        "Python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as stream:
            names = [line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
