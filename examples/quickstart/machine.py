"""Where and with what a run was made."""

import importlib.metadata
import os
import platform

import psutil

from quickstart.stages import NUM_PROCESSES


def describe_machine() -> dict[str, str]:
    """Return processor, memory, Python and package versions, as text."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "transformers")}
    memory = psutil.virtual_memory().total / 2**30
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB",
        "processes": f"{NUM_PROCESSES}: tensor parallel 2 x pipeline parallel 2, sequence parallel, over gloo",
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
