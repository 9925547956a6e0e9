import os
import subprocess
import sys

import pytest

from megatron_vlm.platform.launch.environment import library_environment
from tests.support.configs import tiny_run

ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def training(**settings):
    return tiny_run(training=settings).training


def test_memory_of_the_device_grows_in_place_by_default():
    assert library_environment({"PATH": "/bin"}, training()) == ALLOCATOR


@pytest.mark.parametrize("name", ALLOCATOR)
def test_allocator_settings_of_the_user_stay(name):
    assert library_environment({name: "backend:cudaMallocAsync"}, training()) == {}


def test_deterministic_mode_tells_the_libraries_beside_torch():
    assert library_environment({}, training(deterministic=True)) == {
        **ALLOCATOR,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Ring",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }


def test_deterministic_mode_keeps_what_the_user_chose_but_not_what_contradicts_it():
    mine = {"NCCL_ALGO": "Tree", "CUBLAS_WORKSPACE_CONFIG": ":16:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"}
    wanted = library_environment(mine, training(deterministic=True))
    assert wanted == {**ALLOCATOR, "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}


def test_torch_accepts_the_allocator_settings():
    script = "import torch; torch.cuda.memory; print(torch.zeros(1).item())"
    environment = {**os.environ, **library_environment({}, training(deterministic=True))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0.0\n", "")


@pytest.mark.parametrize(("recipe", "is_allowed"), [("delayed", True), ("tensorwise", False)])
def test_run_that_leaves_pickled_state_in_its_checkpoints_may_read_it_back(recipe, is_allowed):
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    settings = training(fp8="hybrid", fp8_recipe=recipe)
    assert (name in library_environment({}, settings)) == is_allowed
    assert name not in library_environment({name: "0"}, settings)
    assert name not in library_environment({}, training(fp8_recipe=recipe))
