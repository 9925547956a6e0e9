"""Folders as people publish them: settings left out or null, other files, another image size."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.checkpoint.tensors import hash_weights, read_tensor
from megatron_vlm.cli.main import main
from megatron_vlm.config import CheckpointConfig, CheckpointError, UsageError
from megatron_vlm.config.towers.s2 import Config as ScaledConfig
from megatron_vlm.convert.families import llava
from megatron_vlm.convert.folder import read_settings
from megatron_vlm.convert.from_hf import ImportOptions, import_model, import_parts, open_model_folder
from megatron_vlm.convert.processing import at_image_size, with_processing
from tests.support.configs import tiny_run
from tests.support.jobs import start
from tests.support.llama_folders import copy_with_config

OPTIONS = ImportOptions(projection="mlp2x_gelu")
POSITIONS = "model.vision_model.position_embeddings.weight"
LLAVA_15 = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
}
"""Settings of llava-1.5-7b-hf, whose decoder names what differs from transformers' defaults."""


def weights_of(run):
    return hash_weights(read_run_settings(run).checkpoint)


def test_what_a_config_leaves_out_is_what_transformers_takes(llama_dir, clip_dir, imported, tmp_path):
    nulls = dict.fromkeys(("attention_bias", "mlp_bias", "rope_scaling", "initializer_range"))
    settings, without = {"torch_dtype": "float16", **nulls}, ("model_type", "dtype")
    folders = (copy_with_config(one, tmp_path / one.name, settings, *without) for one in (llama_dir, clip_dir))
    import_parts(*folders, tmp_path / "run", OPTIONS)
    assert weights_of(tmp_path / "run") == weights_of(imported)


def test_the_settings_of_the_published_llava_are_those_of_vicuna_and_clip():
    from transformers import LlamaConfig

    model = llava.config_from_hf(LLAVA_15, where="config.json")
    expected = LlamaConfig()
    assert (model.language.hidden_size, model.language.num_layers) == (expected.hidden_size, expected.num_hidden_layers)
    assert model.language.ffn_hidden_size == expected.intermediate_size
    assert model.language.num_attention_heads == model.language.query_groups == expected.num_attention_heads
    assert (model.language.vocab_size, model.language.layernorm_epsilon) == (32000, 1e-5)
    assert (model.vision.hidden_size, model.vision.num_layers, model.vision.image_size) == (1024, 24, 336)
    assert model.constant_image_tokens == 576


def test_weights_of_another_size_than_the_defaults_are_one_line(exported, tmp_path):
    folder = copy_with_config(exported, tmp_path / "llava", {"text_config": {"vocab_size": 402}})
    with pytest.raises(CheckpointError, match=r"weights and config.json differ: \d+ missing"):
        import_model(folder, tmp_path / "run")


@pytest.mark.parametrize("without", ["model_type", "architectures"])
def test_a_whole_model_needs_only_one_of_its_names(without, exported, tmp_path):
    folder = copy_with_config(exported, tmp_path / "llava", {}, without)
    config = json.loads((folder / "config.json").read_text())
    for section in ("text_config", "vision_config"):
        del config[section]["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    (found, tensors), (expected, theirs) = map(open_model_folder, (folder, exported))
    assert found == expected
    assert tensors.keys() == theirs.keys()


def test_the_image_processor_of_transformers_5_is_read(exported, tmp_path):
    folder = tmp_path / "llava"
    shutil.copytree(exported, folder)
    (folder / "preprocessor_config.json").unlink()
    processor = {"image_processor": {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    vision = open_model_folder(folder)[0].vision
    assert (vision.image_mean, vision.image_std) == ((0.5,) * 3, (0.25,) * 3)


def test_an_image_processor_that_names_no_colours_leaves_those_of_the_tower(model_config, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": null, "do_normalize": true}')
    assert with_processing(model_config.vision, tmp_path) == model_config.vision
    assert read_settings(tmp_path / "preprocessor_config.json") == {"do_normalize": True}


def test_another_image_size_gives_the_weights_that_load_weights_gives(
    llama_dir, clip_dir, imported, one_rank, tmp_path
):
    model = import_parts(llama_dir, clip_dir, tmp_path / "run", replace(OPTIONS, image_size=48))
    assert model.vision.image_size == 48
    config = replace(
        tiny_run(str(tmp_path / "loaded"), model=model), checkpoint=CheckpointConfig(load_weights=str(imported))
    )
    (chunk,) = start(config).chunks
    ours = read_tensor(read_run_settings(tmp_path / "run").checkpoint, POSITIONS)
    assert torch.equal(ours, chunk.vision_model.position_embeddings.weight)


def test_a_whole_model_is_imported_for_another_image_size(exported, tmp_path):
    arguments = ["--model", str(exported), "--output", str(tmp_path / "run"), "--image-size", "64"]
    assert main(["convert", "from-hf", *arguments]) == 0
    settings = read_run_settings(tmp_path / "run")
    assert settings.model.constant_image_tokens == 64
    assert read_tensor(settings.checkpoint, POSITIONS).shape == (65, 36)


def test_an_image_size_that_the_config_does_not_have_is_refused(exported, model_config, tmp_path):
    with pytest.raises(CheckpointError, match=r"vision.image_size=64, the folder has 32; .*with --image-size"):
        import_model(exported, tmp_path / "run", at_image_size(model_config, 64))
    scaled = replace(model_config, vision=ScaledConfig(scales=(32,), tower=model_config.vision))
    with pytest.raises(UsageError, match="a tower of type s2 has sizes of its own"):
        at_image_size(scaled, 64)
    arguments = ["--peft", str(exported), "--base", str(exported), "--output", str(tmp_path / "run")]
    assert main(["convert", "from-hf", *arguments, "--image-size", "64"]) == 64
