"""Folders as people publish them: settings left out or null, other files, another image size."""

import json

import pytest

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.checkpoint.tensors import hash_weights
from megatron_vlm.config import CheckpointError
from megatron_vlm.convert.families import llava
from megatron_vlm.convert.from_hf import ImportOptions, import_model, import_parts, open_model_folder
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
    (found, tensors, _), (expected, theirs, _) = map(open_model_folder, (folder, exported))
    assert found == expected
    assert tensors.keys() == theirs.keys()
