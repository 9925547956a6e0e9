"""Real weights of SmolLM2-135M and a DINOv2, in at TP and PP 1 and 3: logits of transformers, every bit out again."""

import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.cli.main import main
from tests.support.configs import tiny_run
from tests.support.real_weights import CONFIG, make_real_weights

pytestmark = pytest.mark.slow
LENGTH = 1200
MAX_KL = 1e-6
LAYOUTS = {
    "one process": {},
    "TP 3": {"tensor_model_parallel_size": 3},
    "PP 3": {"pipeline_model_parallel_size": 3},
}


@pytest.fixture(scope="module")
def weights() -> Path:
    """The folders of both models."""
    return make_real_weights()


@pytest.fixture(scope="module")
def run(weights, tmp_path_factory) -> Path:
    """What `convert from-hf` makes of them."""
    folder = tmp_path_factory.mktemp("real") / "run"
    parts = ["--language", str(weights / "smollm2"), "--vision", str(weights / "dinov2"), "--config", str(CONFIG)]
    assert main(["convert", "from-hf", *parts, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def expected(weights) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of a text, int64[1, s], and the logits of transformers, float32[s, v]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:20])
    ids = AutoTokenizer.from_pretrained(weights / "smollm2")(text, return_tensors="pt").input_ids[:, :LENGTH]
    model = AutoModelForCausalLM.from_pretrained(weights / "smollm2", dtype=torch.float32)
    with torch.inference_mode():
        return ids, model(ids).logits[0].clone()


def assert_same_bits(found: Path, source: Path) -> None:
    """Every tensor of the source is in the other folder, whose vocabulary may have more rows."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (found, source))
    for name, tensor in theirs.items():
        if "mask_token" not in name:  # part of DINOv2's format, used in its pretraining alone
            assert torch.equal(ours[name][: len(tensor)], tensor), name


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_what_transformers_does_and_gives_the_same_bits_out_again(
    layout, weights, run, expected, workers, tmp_path
):
    ids, theirs = expected
    # What is frozen needs no room for gradients and moments.
    frozen = {"freeze": ("vision_model", "language_model")}
    model, parallel = read_run_settings(run).model, LAYOUTS[layout]
    config = tiny_run(str(tmp_path / "run"), model=model, parallel=parallel, training=frozen)
    size = 3 if parallel else 1
    arguments = {"config": config, "weights": str(run), "ids": ids, "output": str(tmp_path / "logits")}
    workers.run("tests.convert.jobs:save_logits", size, timeout=1800, **arguments)
    ours = torch.load(tmp_path / "logits")[:, : theirs.size(1)]
    log_p, log_q = (logits.log_softmax(-1, dtype=torch.float64) for logits in (theirs, ours))
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    print(
        f"{layout}: KL {divergence.mean():.1e} on average, {divergence.max():.1e} at most, top-1 {same:.4f}, "
        f"logits differ by up to {(ours - theirs).abs().max():.1e}"
    )
    assert theirs.std() > 1
    assert divergence.mean() <= MAX_KL
    out = ["--format", "vila", "--tokenizer", str(weights / "smollm2"), "--output", str(tmp_path / "vila")]
    assert main(["convert", "to-hf", str(tmp_path / "run"), *out]) == 0
    assert_same_bits(tmp_path / "vila" / "llm", weights / "smollm2")
    assert_same_bits(tmp_path / "vila" / "vision_tower", weights / "dinov2")


def test_llava_cannot_hold_the_tower_and_names_it(run, tmp_path, capsys):
    assert main(["convert", "to-hf", str(run), "--format", "llava", "--output", str(tmp_path / "llava")]) != 0
    error = capsys.readouterr().err
    assert "a tower of type dinov2 does not fit the format llava" in error
    assert "export to the format vila" in error
    assert not (tmp_path / "llava").exists()
