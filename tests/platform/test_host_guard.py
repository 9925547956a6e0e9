"""What the installed megatron-core asks of CUDA, against what platform/host.py serves.

A new version may ask for more. These tests then name the new calls and the modules they stand in, before a run fails
somewhere in a schedule.
"""

import ast
import json
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

from megatron_vlm.platform import host

LIST_MODULES = """
import importlib, json, sys
from megatron_vlm.platform.device import prepare_process
prepare_process()
for name in ("checkpoint.load", "checkpoint.save", "models.build", "training.optimizer", "training.step"):
    importlib.import_module(f"megatron_vlm.{name}")
modules = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
print(json.dumps({name: path for name, path in modules.items() if name.startswith("megatron.core") and path}))
"""
# Parts of megatron-core that are imported along and that no setting of ours turns on.
UNUSED = (
    "cpu_offloading",
    "cuda_graphs",
    "extensions.transformer_engine",
    "fine_grained_activation_offload",
    "fsdp",
    "fully_sharded",
    "fused_indices_converter",
    "fused_pad_routing_map",
    "inference",
    "moe",
    "nccl_allocator",
    "ssm",
)
# Attributes of torch.cuda that need no stand-in, each with the reason.
NOT_SERVED = {
    "BFloat16Tensor": "a type that is compared with",
    "CUDAGraph": "a type that is compared with",
    "FloatTensor": "a type that is compared with",
    "HalfTensor": "a type that is compared with",
    "OutOfMemoryError": "a type that is caught",
    "_lazy_init": "only asked where the random state goes into CUDA graphs",
    "amp": "decorators that torch has on every machine",
    "clock_rate": "only asked by the straggler detector, which stays off",
    "device": "a context manager of the branch for old versions of torch",
    "is_available": "must say that there is no GPU",
    "nvtx": "only asked where profiling ranges are on",
    "power_draw": "only asked by the straggler detector, which stays off",
    "random": "host.install sets both functions that are asked of it",
    "temperature": "only asked by the straggler detector, which stays off",
    "utilization": "only asked by the straggler detector, which stays off",
}
# Calls given a CUDA device that are not factories of torch, each with the reason.
NOT_REDIRECTED = {
    "symm_mem.empty": "symmetric memory of NVLink, only taken where it is asked for",
    "torch.cuda.Stream": "served as a whole",
}
# What torch itself asks for when megatron-core calls torch.manual_seed.
SERVED_FOR_TORCH = {"manual_seed_all"}
TYPE_NAMES = {"torch.cuda.FloatTensor", "torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor"}


@pytest.fixture(scope="module")
def modules():
    """Syntax trees of the megatron-core modules that a run imports and uses."""
    listing = subprocess.run([sys.executable, "-c", LIST_MODULES], capture_output=True, text=True, check=True).stdout
    return {
        name: ast.parse(Path(path).read_text())
        for name, path in json.loads(listing).items()
        if path.endswith(".py") and not any(part in name for part in UNUSED)
    }


def collect(modules, names_of):
    """Return every name that `names_of(node)` yields, with the modules it stands in."""
    found = defaultdict(set)
    for module, tree in modules.items():
        for node in ast.walk(tree):
            for name in names_of(node):
                found[name].add(module)
    return found


def cuda_attributes(node):
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
        yield node.attr
    if isinstance(node, ast.ImportFrom) and node.module == "torch.cuda":
        yield from (alias.name for alias in node.names)


def calls_with_cuda_device(node):
    """Yield functions that are given `device="cuda"`; a device from torch.cuda.current_device() is served there."""
    if not isinstance(node, ast.Call):
        return
    for keyword in node.keywords:
        constants = [part.value for part in ast.walk(keyword.value) if isinstance(part, ast.Constant)]
        if keyword.arg == "device" and any(str(value).startswith("cuda") for value in constants):
            yield ast.unparse(node.func)


def type_names(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        if node.value.startswith("torch.cuda.") and node.value.endswith("Tensor"):
            yield node.value


def explain(found, known, what):
    way_out = "serve it in megatron_vlm/platform/host.py, or say in tests/platform/test_host_guard.py why not"
    lines = [
        f"megatron-core {version('megatron-core')} {what} {name} (in {', '.join(sorted(found[name])[:3])}): {way_out}"
        for name in sorted(set(found) - set(known))
    ]
    return "\n".join(lines)


def test_modules_of_a_run_are_looked_at(modules):
    assert {"megatron.core.optimizer.distrib_optimizer", "megatron.core.pipeline_parallel.schedules"} < set(modules)


def test_every_attribute_of_torch_cuda_is_served_or_needs_no_stand_in(modules):
    found = collect(modules, cuda_attributes)
    problems = explain(found, {*host.SERVED, *NOT_SERVED}, "uses torch.cuda attribute")
    assert not problems, problems


def test_nothing_is_served_or_excused_that_nobody_asks_for(modules):
    found = set(collect(modules, cuda_attributes))
    assert not {*host.SERVED, *NOT_SERVED} - found - SERVED_FOR_TORCH


def test_every_call_with_a_cuda_device_is_redirected(modules):
    found = collect(modules, calls_with_cuda_device)
    problems = explain(
        found, {*NOT_REDIRECTED, *(f"torch.{name}" for name in host.FACTORIES)}, "gives a CUDA device to"
    )
    assert not problems, problems


def test_every_name_of_a_cuda_type_is_answered(modules):
    found = collect(modules, type_names)
    problems = explain(found, TYPE_NAMES, "compares with")
    assert not problems, problems


def test_new_use_is_reported_with_its_module():
    modules = {
        "megatron.core.new": ast.parse("torch.cuda.graph_pool_handle()\ntorch.empty_strided(2, device='cuda:0')")
    }
    attributes, calls = collect(modules, cuda_attributes), collect(modules, calls_with_cuda_device)
    assert "graph_pool_handle (in megatron.core.new)" in explain(attributes, host.SERVED, "uses")
    assert set(calls) == {"torch.empty_strided"}
