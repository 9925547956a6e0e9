"""Every family, saved by transformers 4 and 5: in, and out again with the same bits; the logits of transformers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlm.checkpoint.open_model import open_model
from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.checkpoint.tensors import read_tensor
from megatron_vlm.config.towers import innermost
from megatron_vlm.convert.family import find_family
from megatron_vlm.convert.folder import HFFolder, read_settings
from megatron_vlm.convert.from_hf import ImportOptions, import_model, import_parts
from megatron_vlm.convert.to_hf import export_model
from tests.support import published_folders
from tests.support.radio import SETTINGS as RADIO
from tests.support.sentence_piece import NUM_PIECES
from tests.support.vision_towers import PUBLISHED

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TRANSFORMERS_5 = Path(os.environ.get("VENV_TRANSFORMERS5", ROOT / ".venv-transformers5")) / "bin/python"
MAX_KL = 1e-7
_SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "max_position_embeddings": 4096}
LANGUAGE = {
    "llama_2": {"num_attention_heads": 4},  # Vicuna's, too
    "sheared_llama": {"num_attention_heads": 6, "num_key_value_heads": 6},
    "llama_3": {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 500000.0, "rms_norm_eps": 1e-5},
    "yi": {"num_attention_heads": 6, "num_key_value_heads": 2, "rope_theta": 5000000.0},
    "smollm2": {"num_attention_heads": 3, "num_key_value_heads": 1, "rope_theta": 1e5, "tie_word_embeddings": True},
}
_CLIP = PUBLISHED["clip"][1]
_LLAVA = {
    "text_config": {**_SIZES, **LANGUAGE["llama_3"], "vocab_size": NUM_PIECES + 64},
    "vision_config": _CLIP,
    "image_token_index": NUM_PIECES,
    "pad_token_id": NUM_PIECES + 1,
}
CASES = [
    *([name, "LlamaForCausalLM", {**_SIZES, **own, "vocab_size": NUM_PIECES}] for name, own in LANGUAGE.items()),
    *([name, f"{kind}Model", settings] for name, (kind, settings) in PUBLISHED.items()),
    ["radio", "RadioModel", {key: value for key, value in RADIO.items() if key != "model_type"}],
    ["llava", "LlavaForConditionalGeneration", _LLAVA],
]


@pytest.fixture(scope="module", params=["transformers 4", "transformers 5"])
def folders(request, tokenizer_path, tmp_path_factory):
    """The folders of all cases, saved by one version."""
    python = sys.executable if request.param == "transformers 4" else TRANSFORMERS_5
    if not Path(python).exists():
        pytest.skip("needs bash tests/convert/setup_transformers5.sh")
    output = tmp_path_factory.mktemp("published")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, published_folders.__file__, str(output)]
    done = subprocess.run(command, input=json.dumps(CASES), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in (*LANGUAGE, "llava"):
        shutil.copy(tokenizer_path, output / name / "tokenizer.model")
    return output


def tensors_out(checkpoint, family, config):
    """Return the tensors of a checkpoint under their names in the format of a family."""
    made = {}
    for rule in family.rules(config):
        for layer in rule.layers:
            whole = read_tensor(checkpoint, rule.key, layer)
            made.update(zip(rule.names_of(layer), rule.transform.split(whole), strict=True))
    return made


def assert_same_bits(made, folder, family, config, rows=None):
    """Every tensor made is in the folder, up to rows of the vocabulary, and every other one there has no use."""
    source = HFFolder(folder, family.renames(read_settings(folder / "config.json")))
    for name, tensor in made.items():
        expected = source.read(name)
        assert torch.equal(tensor[: len(expected)][:rows], expected[:rows]), name
    known = made.keys() | family.constants(config).keys()
    others = [name for name in source.stored if name not in known]
    assert all(any(re.fullmatch(pattern, name) for pattern in family.unused(config)) for name in others)


def assert_logits(run, expected):
    """Compare ours with those of transformers over all positions."""
    settings, ids = read_run_settings(run), expected["input_ids"]
    pixels = expected.get("pixels", torch.zeros(0, 3, 32, 32))
    places = (ids[0] == settings.model.language.image_token_id).nonzero()[:, 0]
    with open_model(settings) as model, torch.no_grad():
        ours = model(ids, pixels, places[: len(places) * bool(len(pixels))], num_images=len(pixels))
    ours, theirs = (logits[..., :NUM_PIECES].double().log_softmax(-1) for logits in (ours, expected["logits"]))
    assert ours.size(1) >= 1000
    assert theirs.std() > 0.3
    assert (theirs.exp() * (theirs - ours)).sum(-1).mean() <= MAX_KL
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_language_model_comes_back_bit_for_bit(name, folders, tmp_path):
    model = import_parts(folders / name, folders / "clip", tmp_path / "run", ImportOptions())
    settings, family = read_run_settings(tmp_path / "run"), find_family("llama", "language", "")
    assert_same_bits(tensors_out(settings.checkpoint, family, model.language), folders / name, family, model.language)
    assert_logits(tmp_path / "run", load_file(folders / f"{name}.safetensors"))
    export_model(settings, tmp_path / "hf")
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    for key, tensor in load_file(folders / name / "model.safetensors").items():
        if not (key == "lm_head.weight" and model.language.share_embeddings_and_output_weights):
            assert torch.equal(exported[f"language_model.{key}"][: len(tensor)], tensor), key


@pytest.mark.parametrize("name", [*PUBLISHED, "radio"])
def test_a_tower_comes_back_bit_for_bit(name, folders, tmp_path):
    if not (folders / name).exists():
        pytest.skip("this version of transformers has no such class")
    options = ImportOptions(feature_layer=-1)
    model = import_parts(folders / "llama_2", folders / name, tmp_path / "run", options)
    family = find_family(read_settings(folders / name / "config.json")["model_type"], "vision", "")
    made = tensors_out(read_run_settings(tmp_path / "run").checkpoint, family, innermost(model.vision))
    assert_same_bits(made, folders / name, family, innermost(model.vision))


def test_a_whole_model_comes_back_bit_for_bit(folders, tmp_path):
    import_model(folders / "llava", tmp_path / "run")
    settings = read_run_settings(tmp_path / "run")
    family = find_family("llava", "model", "")
    made = tensors_out(settings.checkpoint, family, settings.model)
    assert_same_bits(made, folders / "llava", family, settings.model, rows=NUM_PIECES)
    assert_logits(tmp_path / "run", load_file(folders / "llava.safetensors"))
