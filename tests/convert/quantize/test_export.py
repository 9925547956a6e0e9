"""Quantised folders, by the tensors in them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.checkpoint.tensors import read_tensor, write_weights
from megatron_vlm.config import CheckpointError, UsageError, config_to_dict
from megatron_vlm.convert.families import llava
from megatron_vlm.convert.from_hf import import_model
from megatron_vlm.convert.quantize.export import QuantizeOptions
from megatron_vlm.convert.quantize.layout import find_layout
from megatron_vlm.convert.to_hf import ExportOptions, export_model
from tests.support.quantized import dequantised

METHODS = ("awq", "compressed-tensors")


@pytest.fixture(scope="module")
def options(calibration):
    """Return options of an export: options(method, group_size=64)."""

    def make(method: str, dtype=None, **changes) -> ExportOptions:
        quantize = QuantizeOptions(**{"method": method, "calibration": calibration, "group_size": 32, **changes})
        return ExportOptions(quantize=quantize, dtype=dtype)

    return make


@pytest.fixture(scope="module")
def export(make_run, model_config, options, tmp_path_factory):
    """Return a folder that is only to be read: export(method)."""
    made: dict[str, Path] = {}

    def make(method: str) -> Path:
        if method not in made:
            made[method] = tmp_path_factory.mktemp("quantised") / "hf"
            export_model(read_run_settings(make_run(model_config)), made[method], options(method))
        return made[method]

    return make


@pytest.fixture(scope="module")
def plain(make_run, model_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "hf"
    export_model(read_run_settings(make_run(model_config)), folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_the_card_says_how_it_is_rounded_and_what_loads_it(method, export):
    card = (export(method) / "README.md").read_text()
    assert f"matrices of the decoder in 4 bits ({method}, groups of 32, " in card
    assert f"this folder needs {find_layout(method, None).LOADED_BY}." in card
    assert "--verify" not in card


@pytest.mark.parametrize("method", METHODS)
def test_only_the_matrices_of_the_decoder_are_quantised(method, export, plain):
    layout, tensors = find_layout(method, None), load_file(export(method) / "model.safetensors")
    found = dequantised(tensors, layout, 32)
    assert set(found) == set(plain)
    layers = "language_model.model.layers."
    quantised = {name for name in found if name not in tensors}
    assert quantised == {name for name in plain if name.startswith(layers) and "norm" not in name}
    for name, tensor in plain.items():
        if name in quantised:
            continue
        if name.startswith(layers):  # a norm, which took the factors
            assert not torch.equal(found[name].float(), tensor)
        else:
            assert torch.equal(found[name], tensor.to(found[name].dtype)), name


@pytest.mark.parametrize("method", METHODS)
def test_config_json_names_what_is_quantised(method, export):
    config = json.loads((export(method) / "config.json").read_text())
    settings = config["quantization_config"]
    assert settings["quant_method"] == method
    if method == "awq":
        assert config["dtype"] == config["text_config"]["dtype"] == "float16"
        parts = ["lm_head", "vision_tower", "multi_modal_projector"]
        assert settings["modules_to_not_convert"][::2] == parts
        assert settings["modules_to_not_convert"][1::2] == [f"model.{name}" for name in parts]
        assert (settings["bits"], settings["group_size"], settings["version"]) == (4, 32, "gemm")
    else:
        assert settings["ignore"] == ["re:.*lm_head.*", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
        assert settings["config_groups"]["group_0"]["weights"]["group_size"] == 32


@pytest.mark.parametrize("method", METHODS)
def test_the_same_export_has_the_same_bytes(method, export, make_run, model_config, options, tmp_path):
    export_model(read_run_settings(make_run(model_config)), tmp_path / "hf", options(method))
    files = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert files == {path.name: path.read_bytes() for path in export(method).iterdir()}


def test_bfloat16_is_kept_where_the_layout_can_store_it(make_run, model_config, options, tmp_path):
    settings = read_run_settings(make_run(model_config))
    export_model(settings, tmp_path / "hf", options("compressed-tensors", dtype="bfloat16"))
    types = {tensor.dtype for tensor in load_file(tmp_path / "hf" / "model.safetensors").values()}
    assert types == {torch.bfloat16, torch.int32, torch.int64}
    with pytest.raises(UsageError, match="a folder quantised by awq is float16, not bfloat16"):
        export_model(settings, tmp_path / "other", options("awq", dtype="bfloat16"))


def test_a_quantised_folder_is_not_imported(export, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"the weights are quantised \(awq\) .*; fix: use the model that they were"
    ):
        import_model(export("awq"), tmp_path / "run")


def test_tinychat_is_a_pickle_in_the_folder_of_the_language_model(make_run, model_config, options, plain, tmp_path):
    asked = replace(options("awq", layout="tinychat", group_size=64), format="vila")
    export_model(read_run_settings(make_run(model_config)), tmp_path / "hf", asked)
    assert not list((tmp_path / "hf" / "llm").glob("*.safetensors"))
    pickled = torch.load(tmp_path / "hf" / "llm" / "llm-w4-g64-awq-v2.pt", weights_only=True)
    found = dequantised(pickled, find_layout("awq", "tinychat"), 64)
    language = "language_model."
    assert found.keys() == {name.removeprefix(language) for name in plain if name.startswith(language)}
    for part in ("vision_tower", "mm_projector"):
        types = {tensor.dtype for tensor in load_file(tmp_path / "hf" / part / "model.safetensors").values()}
        assert types <= {torch.float16, torch.int64}
    weight = plain["language_model.model.layers.1.self_attn.q_proj.weight"]
    factors = (
        plain["language_model.model.layers.1.input_layernorm.weight"] / found["model.layers.1.input_layernorm.weight"]
    )
    error = (found["model.layers.1.self_attn.q_proj.weight"] / factors - weight).abs()
    # The step is a third of the standard deviation: a quarter of it is lost, on average, and more where levels are cut.
    assert error.mean() < 0.15 * weight.abs().mean()


def test_gemm_in_the_format_vila_is_named_in_the_config_of_the_language_model(
    make_run, model_config, options, plain, tmp_path
):
    export_model(read_run_settings(make_run(model_config)), tmp_path / "hf", replace(options("awq"), format="vila"))
    settings = json.loads((tmp_path / "hf" / "llm" / "config.json").read_text())["quantization_config"]
    assert settings["modules_to_not_convert"] == ["lm_head", "model.lm_head"]
    found = dequantised(load_file(tmp_path / "hf" / "llm" / "model.safetensors"), find_layout("awq", "gemm"), 32)
    language = "language_model."
    assert found.keys() == {name.removeprefix(language) for name in plain if name.startswith(language)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"group_size": 128},
            "q_proj has 64 inputs, not a multiple of the group size 128; fix: choose --group-size 64",
        ),
        ({"layout": "gemv"}, "awq has no layout 'gemv'; fix: choose one of gemm, tinychat"),
        ({"layout": "tinychat", "group_size": 64}, "layout tinychat is a file in the folder of the language model"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(changes, message, make_run, model_config, options, tmp_path):
    with pytest.raises(UsageError, match=message):
        export_model(read_run_settings(make_run(model_config)), tmp_path / "hf", options("awq", **changes))
    assert not list(tmp_path.iterdir())


def test_rows_that_do_not_fill_an_integer_are_refused(make_run, model_config, options, tmp_path):
    settings = read_run_settings(make_run(model_config))
    odd = replace(
        settings.model.language, ffn_hidden_size=96, num_attention_heads=2, num_query_groups=1, kv_channels=36
    )
    with pytest.raises(UsageError, match="k_proj has 36 outputs of 64 inputs; the layout takes multiples of 8 and 8"):
        export_model(replace(settings, model=replace(settings.model, language=odd)), tmp_path / "hf", options("awq"))


def test_a_weight_that_float16_cannot_hold_is_refused(make_run, model_config, options, tmp_path, tokenizer_path):
    checkpoint = read_run_settings(make_run(model_config)).checkpoint
    tensors = {rule.key: read_tensor(checkpoint, rule.key) for rule in llava.rules(model_config)}
    tensors["model.language_model.decoder.final_layernorm.weight"][3] = 1e5
    config = {"model": config_to_dict(model_config), "data": {"tokenizer": str(tokenizer_path), "image_aspect": "pad"}}
    write_weights(tmp_path / "run", tensors, config)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds values that float16 cannot hold"):
        export_model(read_run_settings(tmp_path / "run"), tmp_path / "hf", options("awq"))
    assert not (tmp_path / "hf").exists()


def test_scales_that_float16_cannot_hold_are_refused(make_run, model_config, options, tmp_path, tokenizer_path):
    checkpoint = read_run_settings(make_run(model_config)).checkpoint
    tensors = {rule.key: read_tensor(checkpoint, rule.key) for rule in llava.rules(model_config)}
    tensors["model.language_model.decoder.layers.mlp.linear_fc2.weight"][1] *= torch.inf
    config = {"model": config_to_dict(model_config), "data": {"tokenizer": str(tokenizer_path), "image_aspect": "pad"}}
    write_weights(tmp_path / "run", tensors, config)
    with pytest.raises(CheckpointError, match=r"layers\.1\..* has values that are not finite in float16; fix: check"):
        export_model(read_run_settings(tmp_path / "run"), tmp_path / "hf", options("awq"))
