"""The layouts of the VILA examples are those that the cost model finds, and their README says what it predicts."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.config import TrainConfig, derive_layout, load_config
from megatron_vlm.costs.cluster import Cluster
from megatron_vlm.costs.layouts import rank_layouts
from megatron_vlm.costs.memory import estimate_memory
from megatron_vlm.costs.rows import pairs
from megatron_vlm.costs.step_time import predict_step

FOLDER = Path(__file__).parents[2] / "examples" / "vila_7b"
# File, GPUs, and the layout that it has: tensor parallel, pipeline, data parallel size, rows of a micro-batch.
FILES = [
    ("align.yaml", "A100", 128, (1, 1, 128, 1)),
    ("pretrain.yaml", "A100", 128, (1, 1, 128, 1)),
    ("sft.yaml", "A100", 128, (4, 1, 32, 1)),
    ("visual_expert.yaml", "A100", 128, (2, 1, 64, 2)),
    ("lora.yaml", "A100", 8, (1, 1, 8, 1)),
    ("h100/align.yaml", "H100", 64, (1, 1, 64, 2)),
    ("h100/pretrain.yaml", "H100", 64, (1, 1, 64, 1)),
    ("h100/sft.yaml", "H100", 64, (2, 1, 32, 1)),
]
RANKED_EACH_TIME = {"sft.yaml", "lora.yaml", "h100/pretrain.yaml"}
"""Files whose layouts are ranked without `-m slow`; each takes seconds."""
ROOMIER = {"visual_expert.yaml"}
"""Files with a layout that is at most 3 % slower, because the suggested one leaves less than 5 GB of a GPU."""


def predict(config, gpu, world_size):
    return predict_step(config, derive_layout(config, world_size), pairs(config), Cluster(gpu_name=gpu))


@pytest.mark.parametrize(
    ("name", "gpu", "world_size", "expected"),
    [file if file[0] in RANKED_EACH_TIME else pytest.param(*file, marks=pytest.mark.slow) for file in FILES],
)
def test_the_layout_of_a_file_is_the_simplest_of_the_fastest(name, gpu, world_size, expected):
    config = load_config(TrainConfig, FOLDER / name)
    layout = derive_layout(config, world_size)
    sizes = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    assert (*sizes, layout.data_parallel_size, config.training.micro_batch_size) == expected
    ranking = rank_layouts(config, world_size, Cluster(gpu_name=gpu), backend="transformer_engine")
    if name in ROOMIER:
        assert ranking.given.step.seconds <= 1.03 * ranking.suggested.step.seconds
        assert ranking.suggested.memory > Cluster(gpu_name=gpu).gpu.memory - 5e9
    else:
        assert ranking.given.settings == ranking.suggested.settings


@pytest.mark.parametrize(("name", "gpu", "world_size", "expected"), FILES)
def test_a_file_fits_its_gpus(name, gpu, world_size, expected):
    config = load_config(TrainConfig, FOLDER / name)
    size = derive_layout(config, world_size).data_parallel_size
    for stage in range(config.parallel.pipeline_model_parallel_size):
        memory = estimate_memory(config, stage, size, backend="transformer_engine")
        assert memory.total < Cluster(gpu_name=gpu).gpu.memory


def test_pretraining_is_a_tenth_faster_than_with_two_stages_of_two_ranks():
    best = load_config(TrainConfig, FOLDER / "pretrain.yaml")
    split = [f"parallel.{name}_model_parallel_size=2" for name in ("tensor", "pipeline")]
    other = load_config(TrainConfig, FOLDER / "pretrain.yaml", [*split, "parallel.sequence_parallel=true"])
    assert predict(best, "A100", 128).seconds < 0.9 * predict(other, "A100", 128).seconds


def rows_of_the_readme():
    """Return file, GPU, ranks and seconds a step from the table of the README."""
    text = (FOLDER / "README.md").read_text()
    return re.findall(r"^\| `([\w/.]+)` \|.*\| (\d+) (A100|H100) \|.*\| ([\d.]+) s \|", text, flags=re.MULTILINE)


def test_the_readme_names_the_predicted_seconds_of_every_file():
    rows = rows_of_the_readme()
    assert [name for name, *_ in rows] == [name for name, *_ in FILES]
    for name, world_size, gpu, seconds in rows:
        predicted = predict(load_config(TrainConfig, FOLDER / name), gpu, int(world_size)).seconds
        assert float(seconds) == pytest.approx(predicted, abs=0.006), name


def test_the_readme_names_the_predicted_hours():
    hours = dict(re.findall(r"([\d.]+) hours on (\d+)", (FOLDER / "README.md").read_text()))
    hours = {size: value for value, size in hours.items()}
    for file, gpu, size in (("pretrain.yaml", "A100", 128), ("h100/pretrain.yaml", "H100", 64)):
        seconds = predict(load_config(TrainConfig, FOLDER / file), gpu, size).seconds
        # 6.25 million documents of 4.0 images, and 25 million pairs, with 122.5 and 22.7 tokens an image and two more
        # a sample, fill 98 % of their rows.
        tokens = 6.25e6 * (4 * (576 + 122.5) + 2) + 25e6 * (576 + 22.7 + 2)
        steps = tokens / 0.98 / 4096 / 640
        assert float(hours[str(size)]) == pytest.approx(steps * seconds / 3600, rel=0.01)


def test_the_command_answers_within_seconds():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "megatron_vlm", "plan", str(FOLDER / "pretrain.yaml"), "--world-size", "128"]
    done = subprocess.run([*command, "--layouts", "--no-data"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "TP 1 x PP 1 x DP 128, micro-batch 1" in done.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of a core: what else this machine does is not the command's.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20
