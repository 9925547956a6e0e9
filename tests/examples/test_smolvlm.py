"""The example with real weights: corpus, page and config; slowly, that our model computes what transformers does."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from smolvlm import captions, measure

from megatron_vlm.checkpoint.open_model import open_model
from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.cli.main import main
from megatron_vlm.config import load_section
from megatron_vlm.config.model import ModelConfig
from tests.support.real_weights import CONFIG, ROOT, make_real_weights

# Features and hidden states of 12 and 30 layers in float32; their entries are of the order of 1.
TOLERANCE = 1e-4
TEXT = "The caboose, the last of 17 carriages, is for the guard."


@pytest.fixture
def stamps(tmp_path) -> Path:
    """Stamps with captions in two languages, a sign, a picture without a caption, and a caption that comes twice."""
    texts = {
        "animals/fox": "A fox.\nde.utf8=Ein Fuchs.",
        "symbols/a": "The letter a.",
        "food/x": None,
        "z/fox": "A fox.",
    }
    for name, text in texts.items():
        path = tmp_path / "stamps" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture")
        if text:
            path.with_suffix(".txt").write_text(text)
    return tmp_path / "stamps"


def test_pairs_are_pictures_with_their_english_captions(stamps):
    assert captions.read_pairs(stamps) == [(stamps / "animals" / "fox.png", "A fox.")]


def test_the_tar_has_a_picture_and_a_caption_under_each_key(stamps, tmp_path):
    captions.write_tar(captions.read_pairs(stamps), tmp_path / "pairs" / "0.tar")
    with tarfile.open(tmp_path / "pairs" / "0.tar") as tar:
        assert tar.getnames() == ["000000000.png", "000000000.txt"]
        assert tar.extractfile("000000000.txt").read() == b"A fox."


def test_the_page_shows_pictures_captions_and_losses(stamps):
    one = {"image": str(stamps / "animals" / "fox.png"), "caption": "A <fox>.", "written": "old"}
    before = {"loss": 6.0, "loss_with_another_picture": 6.1, "captions": [one]}
    after = {"loss": 3.25, "loss_with_another_picture": 4.5, "captions": [{**one, "written": "new"}]}
    page = measure.make_page(before, after)
    for text in (
        "A &lt;fox&gt;.",
        "<td>old</td><td>new</td>",
        "<td>3.250</td><td>4.500</td>",
        "data:image/png;base64,",
    ):
        assert text in page


def test_the_config_is_one_of_the_models_that_the_packages_hold():
    model = load_section(ModelConfig, CONFIG, "model")
    assert (model.language.num_layers, model.vision.num_layers) == (30, 12)
    assert model.constant_image_tokens == 16


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[Path, Path]:
    """The real weights as folders, and the run that `convert from-hf` makes of them."""
    weights, folder = make_real_weights(), tmp_path_factory.mktemp("smolvlm")
    parts = ["--language", str(weights / "smollm2"), "--vision", str(weights / "dinov2")]
    assert main(["convert", "from-hf", *parts, "--config", str(CONFIG), "--output", str(folder / "start")]) == 0
    return weights, folder / "start"


@pytest.mark.slow
def test_real_weights_compute_the_hidden_states_of_transformers(start):
    from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Model

    folder, run = start
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder / "smollm2")(TEXT).input_ids])
    pixels = torch.randint(0, 256, (2, 3, 112, 112), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found: dict[str, torch.Tensor] = {}
    with open_model(read_run_settings(run)) as model, torch.inference_mode():
        model.language_model.decoder.register_forward_hook(lambda _, __, out: found.update(hidden=out[:, 0]))
        logits = model(ids, pixels[:0], torch.zeros(0, dtype=torch.int64), num_images=0)[0]
        features, normalised = model.vision_model(pixels), model.vision_model.normalise(pixels)
    with torch.inference_mode():
        language = AutoModelForCausalLM.from_pretrained(folder / "smollm2")(ids, output_hidden_states=True)
        tower = Dinov2Model.from_pretrained(folder / "dinov2").eval()(normalised)
    assert (found["hidden"] - language.hidden_states[-1][0]).abs().max() <= TOLERANCE
    assert (logits[:, : language.logits.shape[-1]] - language.logits[0]).abs().max() <= TOLERANCE
    assert (features - tower.last_hidden_state[:, 1:]).abs().max() <= TOLERANCE
    assert language.logits[0].std() > 1


@pytest.mark.slow
def test_the_real_language_model_knows_something(start):
    folder, _ = start
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "smollm2")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        best = AutoModelForCausalLM.from_pretrained(folder / "smollm2")(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


@pytest.mark.slow
def test_awq_loses_at_most_half_of_what_rounding_to_nearest_loses(start):
    folder, _ = start
    command = [sys.executable, str(ROOT / "tools" / "benchmarks" / "quantize.py"), str(folder / "smollm2")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
