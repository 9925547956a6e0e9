"""The check of a GPU runs on the CPU with a tiny model; nothing here says what a GPU would measure."""

import argparse
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_vlm.config import TrainConfig, load_config
from megatron_vlm.costs.flops import Work

TOOL = Path(__file__).resolve().parents[2] / "tools" / "gpu_check.py"
SMALL = [
    *("model.language.hidden_size=64", "model.language.ffn_hidden_size=128", "model.language.num_attention_heads=4"),
    *("model.language.num_layers=3", "model.vision.num_layers=3", "model.vision.hidden_size=36"),
    *("model.vision.ffn_hidden_size=72", "model.vision.num_attention_heads=3", "model.vision.image_size=32"),
    *("model.vision.patch_size=8", "data.seq_length=192"),
]


def run(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, TOOL, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def tool():
    return SimpleNamespace(**runpy.run_path(str(TOOL)))


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    done = run("--output", str(tmp_path / "out.json"))
    assert done.returncode == 78
    assert done.stderr.startswith("no GPU is visible")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def test_a_tiny_model_on_the_cpu_gives_every_figure_but_those_of_a_gpu(tmp_path):
    output = tmp_path / "out.json"
    sections = ["layers_bf16", "layers_fp8_transformer_engine", "loader"]
    sizes = ["--device", "cpu", "--layers", "2", "--images", "3", "--rounds", "2"]
    done = run("--output", str(output), *sizes, "--sections", *sections, "--set", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert found["machine"]["device"] == "cpu"
    assert list(found["sections"]) == sections
    layers = found["sections"]["layers_bf16"]["result"]
    assert (layers["num_layers"], layers["num_tokens"], layers["num_images"]) == (2, 192, 3)
    assert layers["num_labels"] == 192 - 3 * 16
    parts = 2 * layers["layer_ms"] + layers["tower_ms"] + layers["embedding_output_and_loss_ms"]
    assert 0 < layers["layer_ms"]
    # The parts are medians of two passes each, which need not be of the same pass.
    assert parts == pytest.approx(layers["forward_backward_ms"], rel=0.01)
    whole = layers["whole_model"]
    assert whole["num_layers"] == 3
    assert whole["tower_share"] == pytest.approx(layers["tower_ms"] / 1e3 / whole["seconds_per_row"])
    assert layers["mfu"] is layers["planned"] is layers["optimizer_step"]["peak_gib"] is None
    assert found["sections"]["layers_fp8_transformer_engine"]["status"] == "not possible here"
    loader = found["sections"]["loader"]["result"]
    workers = 1 / whole["seconds_per_row"] / loader["rows_per_second"]
    assert found["summary"]["loader_workers_per_gpu"] == pytest.approx(workers)


def test_the_prediction_of_plan_stands_beside_the_measured_pass(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    sections = SimpleNamespace(**runpy.run_path(str(TOOL.with_name("gpu_sections.py"))))
    config = load_config(TrainConfig, "examples/vila_7b/pretrain.yaml", ["model.language.num_layers=4"])
    work = Work(num_tokens=4096, attention_pairs=4096 * 4097 // 2, num_labels=640, num_images=6)
    planned = sections.plan_pass(config, work, "A100", 0.1)
    parts = [value for name, value in planned.items() if name not in ("forward_backward_ms", "planned_over_measured")]
    assert planned["forward_backward_ms"] == pytest.approx(sum(parts))
    assert planned["planned_over_measured"] == pytest.approx(planned["forward_backward_ms"] / 100)
    assert 0 < planned["tower_ms"] < planned["forward_backward_ms"]
    assert sections.plan_pass(config, work, None, 0.1) is None


def arguments(**changes):
    settings = {"device": "cpu", "config": TOOL, "layers": 1, "images": 1, "rounds": 1, "tests": [], "set": []}
    return argparse.Namespace(**{**settings, **changes})


def test_a_section_that_fails_is_recorded_with_its_last_words(tool, tmp_path):
    section = tool.Section(name="broken", limit=60, options=("loader",))
    record = tool.run_section(section, arguments(config=tmp_path / "missing.yaml"), 300, tmp_path)
    assert record["status"] in ("failed", "not possible here")
    assert "missing.yaml" in record["reason"]


def test_a_section_out_of_time_is_ended(tool, tmp_path):
    section = tool.Section(name="slow", limit=1, options=("loader",))
    record = tool.run_section(section, arguments(), 0.2, tmp_path)
    assert record["status"] == "out of time"
    assert record["seconds"] < 60
    assert "result" not in record


def test_the_report_of_the_tests_is_counted(tool, tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\ndef test_c(): pytest.skip('no GPU')\n"
    )
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}", "-p", "no:cacheprovider", "test_it.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    found = tool._read_tests(junit)
    assert found["passed"] == 1
    assert list(found["failed"]) == ["test_b"]
    assert found["skipped"] == {"test_c": "no GPU"}


def test_all_sections_together_end_within_eight_minutes(tool):
    assert sum(section.limit for section in tool.SECTIONS) <= tool.SECONDS == 480
