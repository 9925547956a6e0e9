"""The example of each whole model names its preset and a layout that fits the GPUs that it names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.config import ModelConfig, TrainConfig, derive_layout, load_config
from megatron_vlm.config.presets import preset_names
from megatron_vlm.costs.cluster import Cluster
from megatron_vlm.costs.memory import estimate_memory
from tests.support.played_ranks import needs_fake_device

FOLDER = Path(__file__).parents[2] / "examples" / "presets"
NAMES = preset_names(ModelConfig.PRESETS)


def command(name):
    """Return the command that the example opens with, and its GPUs."""
    text = (FOLDER / f"{name}.yaml").read_text()
    words = re.search(r"^#   megatron-vlm (rehearse .*)$", text, flags=re.MULTILINE)[1].split()
    nodes, gpu = re.search(r" on (\d+) nodes with 8 (A100|H100) 80 GB each", text).groups()
    assert words == ["rehearse", f"examples/presets/{name}.yaml", "--world-size", str(8 * int(nodes)), "--gpu", gpu]
    return words, 8 * int(nodes), gpu


def test_every_whole_model_has_an_example():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted([*NAMES, "base"])


@pytest.mark.parametrize("name", NAMES)
def test_an_example_fits_its_gpus(name):
    _, world_size, gpu = command(name)
    config = load_config(TrainConfig, FOLDER / f"{name}.yaml")
    assert f"model:\n  preset: {name}\n" in (FOLDER / f"{name}.yaml").read_text()
    size = derive_layout(config, world_size).data_parallel_size
    for stage in range(config.parallel.pipeline_model_parallel_size):
        memory = estimate_memory(config, stage, size, backend="transformer_engine")
        assert memory.total < Cluster(gpu_name=gpu).gpu.memory


@pytest.mark.slow
@needs_fake_device
@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_rehearsed(name):
    words, _, _ = command(name)
    few = ["--iterations", "1", "--micro-batches", "1", "--workers", "1", "--no-data"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_vlm", *words, *few],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=FOLDER.parents[1],
    )
    assert done.returncode == 0, done.stdout + done.stderr
