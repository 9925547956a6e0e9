"""Towers as they are published, and back: settings, names, and tensors that are not in the table."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_vlm.checkpoint.open_model import open_model
from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.cli.main import main
from megatron_vlm.config import CheckpointError
from megatron_vlm.config.vision_transformer import IMAGENET_MEAN
from megatron_vlm.convert.family import find_family
from megatron_vlm.convert.folder import HFFolder
from tests.support.sentence_piece import NUM_PIECES
from tests.support.vision_towers import (
    PUBLISHED,
    family_of,
    hidden_states,
    our_tensors,
    save_published,
    settings_of,
)

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory, tokenizer_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama_of_towers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=NUM_PIECES)).save_pretrained(folder)
    shutil.copyfile(tokenizer_path, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Return (model, folder) of a tower, made once for each and only to be read: published(name)."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = (save_published(name, folder), folder)
        return made[name]

    return make


def save_whole_siglip(tower, folder):
    """Save a SiglipModel, text tower and all, as google/siglip-so400m-patch14-384 is."""
    from transformers import SiglipConfig, SiglipModel

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = SiglipModel(SiglipConfig(text_config={**text, "vocab_size": 50}, vision_config=tower.config.to_dict()))
    whole.vision_model.load_state_dict(tower.vision_model.state_dict())
    whole.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))


@pytest.mark.parametrize("name", ["siglip", "internvit_6b", "dinov2", "dinov2_with_registers"])
def test_a_published_folder_becomes_a_run_from_the_command_line(name, published, llama_dir, tmp_path, capsys):
    model, folder = published(name)
    if name == "siglip":
        save_whole_siglip(model, folder := tmp_path / "whole")
    arguments = ["--language", str(llama_dir), "--vision", str(folder), "--output", str(tmp_path / "run")]
    assert main(["convert", "from-hf", *arguments]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["vision"]
    settings = read_run_settings(tmp_path / "run")
    vision = settings.model.vision
    assert (printed["type"], printed["image_size"]) == (vision.type, vision.image_size)
    assert vision.image_mean == ((0.5, 0.5, 0.5) if name == "siglip" else IMAGENET_MEAN)
    pixels = torch.randn(2, 3, vision.image_size, vision.image_size)
    with open_model(settings) as opened, torch.no_grad():
        features = opened.vision_model(pixels)
        state = hidden_states(model, pixels)[vision.feature_layer]
        if name.startswith("dinov2"):
            state = model.layernorm(state)
    # float32: the fused query, key and value; features reach 10
    torch.testing.assert_close(features, state[:, vision.num_prefix_tokens :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_loads_what_a_tower_becomes(name, published):
    model, folder = published(name)
    vision, family = settings_of(folder, feature_layer=-1), family_of(folder)
    source, made = HFFolder(folder, family.renames({})), dict(family.constants(vision))
    for rule in family.rules(vision):
        for layer in rule.layers:
            whole = rule.transform.join([source.read(stored) for stored in rule.names_of(layer)])
            assert tuple(whole.shape) == rule.shape
            made.update(zip(rule.names_of(layer), rule.transform.split(whole), strict=True))
    settings = family.config_to_hf(vision)
    assert settings["architectures"] == [type(model).__name__]
    again = type(model)(type(model.config)(**settings))
    again.load_state_dict(made)
    assert family.config_from_hf(settings, where="", feature_layer=-1) == vision
    pixels = torch.randn(2, 3, vision.image_size, vision.image_size)
    assert torch.equal(hidden_states(again, pixels)[-1], hidden_states(model, pixels)[-1])


def test_layers_that_do_not_run_are_not_needed(published):
    _, folder = published("internvit_300m")
    vision, family = settings_of(folder, feature_layer=-2), family_of(folder)
    names = {name for rule in family.rules(vision) for layer in rule.layers for name in rule.names_of(layer)}
    assert not any(name.startswith("encoder.layer.2.") for name in names)
    assert family.unused(vision)[-1] == r"encoder\.layer\.2\..*"
    assert family.config_to_hf(vision)["num_hidden_layers"] == 2


def as_opengvlab(tensors):
    """Return the tensors of an InternVLVisionModel with the names and shapes of OpenGVLab's InternVisionModel."""
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in (
            ("embeddings.cls_token", "embeddings.class_embedding"),
            ("embeddings.position_embeddings", "embeddings.position_embedding"),
            ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
            ("encoder.layer.", "encoder.layers."),
            (".attention.projection_layer.", ".attn.proj."),
            (".attention.", ".attn."),
            (".layernorm_before.", ".norm1."),
            (".layernorm_after.", ".norm2."),
            (".lambda_1", ".ls1"),
            (".lambda_2", ".ls2"),
        ):
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    for name in [name for name in renamed if ".q_proj." in name]:
        parts = [renamed.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        renamed[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    return renamed


@pytest.mark.parametrize("name", ["internvit_6b", "internvit_300m"])
def test_the_folder_of_opengvlab_gives_the_same_tower(name, published, tmp_path):
    _, folder = published(name)
    save_file(as_opengvlab(load_file(folder / WEIGHTS)), tmp_path / WEIGHTS)
    vision = settings_of(folder)
    settings = find_family("intern_vit_6b", "vision", "").config_to_hf(vision)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert settings_of(tmp_path) == vision
    ours, theirs = (our_tensors(path, vision, HFFolder(path).read) for path in (folder, tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_fused_projection_is_split_as_it_was_joined(published):
    _, folder = published("internvit_300m")
    rules = find_family("intern_vit_6b", "vision", "").rules(settings_of(folder))
    (rule,) = (rule for rule in rules if rule.key.endswith("linear_qkv.weight"))
    theirs = torch.randn(72, 24)
    assert torch.equal(rule.transform.split(rule.transform.join([theirs]))[0], theirs)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("siglip", {"hidden_act": "gelu"}, "the tower has hidden_act=gelu"),
        ("dinov2", {"hidden_act": "relu"}, "the tower has hidden_act=relu"),
        ("dinov2", {"qkv_bias": False}, "the tower has qkv_bias=False"),
        ("internvit_6b", {"norm_type": "batch_norm"}, "the tower has norm_type=batch_norm"),
        ("internvit_6b", {"use_absolute_position_embeddings": False}, "has use_absolute_position_embeddings=False"),
        (
            "internvit_6b",
            {"layer_norm_eps": 1e-5},
            "queries and keys are normalised with 1e-06, other norms with 1e-05",
        ),
    ],
)
def test_a_tower_that_ours_cannot_be_is_refused(name, settings, message, published):
    _, folder = published(name)
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        family_of(folder).config_from_hf({**config, **settings}, where=str(folder))


def test_a_tower_that_transformers_cannot_be_is_refused(published):
    _, folder = published("internvit_6b")
    with pytest.raises(CheckpointError, match=r"normalised with 1e-06, .* \(model.vision.layernorm_epsilon\)"):
        family_of(folder).config_to_hf(replace(settings_of(folder), layernorm_epsilon=1e-5))
    _, folder = published("dinov2_giant")
    with pytest.raises(CheckpointError, match="ffn_hidden_size=33 and swiglu is no Dinov2Model"):
        family_of(folder).config_to_hf(replace(settings_of(folder), ffn_hidden_size=33))
