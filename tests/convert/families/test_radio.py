"""RADIO in the forms in which it is published."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlm.checkpoint.open_model import open_model
from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.config import CheckpointError
from megatron_vlm.config.towers.radio import Config
from megatron_vlm.convert.families import radio
from megatron_vlm.convert.from_hf import ImportOptions, import_parts
from tests.support.radio import HIDDEN, LAYERS, SETTINGS, radio_in_plain_torch, radio_tensors, save_radio
from tests.support.sentence_piece import NUM_PIECES
from tests.support.vision_towers import our_tensors, settings_of


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory, tokenizer_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama_of_radio")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=NUM_PIECES)).save_pretrained(folder)
    shutil.copyfile(tokenizer_path, folder / "tokenizer.model")
    return folder


def scales():
    """Return LayerScale as transformers writes it, but with factors that have an effect."""
    generator = torch.Generator().manual_seed(8)
    names = [f"radio_model.model.blocks.{i}.layer_scale{j}.lambda1" for i in range(LAYERS) for j in (1, 2)]
    return {name: 0.5 + torch.rand(HIDDEN, generator=generator) for name in names}


def features_of(folder, llama_dir, run, pixels):
    import_parts(llama_dir, folder, run, ImportOptions())
    with open_model(read_run_settings(run)) as opened, torch.no_grad():
        return opened.vision_model(pixels)


def test_a_folder_becomes_a_run(llama_dir, tmp_path):
    folder, pixels = save_radio(tmp_path / "hf", radio_tensors()), torch.randn(2, 3, 32, 32)
    # A processor that does not normalise names colours that nothing uses.
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "image_mean": [0.0] * 3}))
    features = features_of(folder, llama_dir, tmp_path / "run", pixels)
    torch.testing.assert_close(features, radio_in_plain_torch(radio_tensors(), pixels)[:, 5:], rtol=1e-5, atol=1e-5)
    assert (
        read_run_settings(tmp_path / "run").model.vision.image_mean == Config.__dataclass_fields__["image_mean"].default
    )


def test_layer_scale_goes_into_the_layers_before_it(llama_dir, tmp_path):
    tensors, pixels = radio_tensors(), torch.randn(2, 3, 32, 32)
    scaled = save_radio(tmp_path / "scaled", {**tensors, **scales()})
    for name, factors in scales().items():
        before = "attn.proj" if "scale1" in name else "mlp.fc2"
        for kind in ("weight", "bias"):
            layer = name.replace(name.split(".")[-2] + ".lambda1", f"{before}.{kind}")
            tensors[layer] = torch.einsum("r,r...->r...", factors, tensors[layer])
    expected = radio_in_plain_torch(tensors, pixels)[:, 5:]
    features = features_of(scaled, llama_dir, tmp_path / "run", pixels)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_layer_scale_of_another_width_is_refused(llama_dir, tmp_path):
    name = "radio_model.model.blocks.1.layer_scale1.lambda1"
    folder = save_radio(tmp_path / "hf", {**radio_tensors(), name: torch.ones(HIDDEN + 1)})
    with pytest.raises(CheckpointError, match=rf"1 of another shape: {name} \[25\] instead of \[24\]"):
        import_parts(llama_dir, folder, tmp_path / "run", ImportOptions())


def test_a_backbone_saved_alone_gives_the_same_tower(llama_dir, tmp_path):
    pixels, features = torch.randn(1, 3, 32, 32), []
    for number, prefix in enumerate(("radio_model.model.", "base_model.")):
        tensors = {name.replace("radio_model.model.", prefix): tensor for name, tensor in radio_tensors().items()}
        folder = save_radio(tmp_path / f"{number}", tensors)
        features.append(features_of(folder, llama_dir, tmp_path / f"run{number}", pixels))
    assert torch.equal(*features)


def test_features_that_the_model_would_normalise_are_refused(llama_dir, tmp_path):
    extra = {"radio_model.feature_normalizer.mean": torch.zeros(HIDDEN)}
    folder = save_radio(tmp_path / "hf", {**radio_tensors(), **extra})
    with pytest.raises(CheckpointError, match="1 unexpected: radio_model.feature_normalizer.mean"):
        import_parts(llama_dir, folder, tmp_path / "run", ImportOptions())


def test_heads_that_imitate_teachers_are_not_needed(llama_dir, tmp_path):
    extra = {"radio_model.adaptors.clip.head_mlp.fc1.weight": torch.zeros(2)}
    folder = save_radio(tmp_path / "hf", {**radio_tensors(), **extra})
    import_parts(llama_dir, folder, tmp_path / "run", ImportOptions())


def test_tensors_become_what_they_were(tmp_path):
    tensors, folder = radio_tensors(), save_radio(tmp_path / "hf", radio_tensors())
    vision, made = settings_of(folder), {}
    stored = load_file(folder / "model.safetensors")
    for rule in radio.rules(vision):
        for layer in rule.layers:
            whole = rule.transform.join([stored[name] for name in rule.names_of(layer)])
            assert tuple(whole.shape) == rule.shape
            made.update(zip(rule.names_of(layer), rule.transform.split(whole), strict=True))
    assert made.keys() == tensors.keys() - radio.constants(vision).keys()
    assert torch.equal(radio.constants(vision)["radio_model.summary_idxs"], tensors["radio_model.summary_idxs"])
    assert all(torch.equal(made[name], tensors[name]) for name in made)
    assert len(our_tensors(folder, vision, stored.__getitem__)) == len(vision.parameter_sizes)


def test_settings_become_what_they_were(tmp_path):
    vision = settings_of(save_radio(tmp_path / "hf", radio_tensors()))
    assert (vision.num_class_tokens, vision.num_registers, vision.summary_tokens) == (3, 2, (0, 2))
    assert vision.position_grid == 6
    again = radio.config_to_hf(vision)
    assert SETTINGS.items() <= again.items()
    assert radio.config_from_hf(again, where="") == vision


@pytest.mark.parametrize("settings", [{"use_swiglu_ffn": True}, {"qkv_bias": False}, {"hidden_act": "relu"}])
def test_a_tower_that_ours_cannot_be_is_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(CheckpointError, match=f"the tower has {name}={value}"):
        radio.config_from_hf({**SETTINGS, **settings}, where="config.json")


def test_a_width_that_transformers_does_not_arrive_at_is_refused():
    sizes = {"num_layers": 1, "hidden_size": 49, "ffn_hidden_size": 16, "num_attention_heads": 7}
    assert int(49 * (16 / 49)) == 15  # in floating point
    with pytest.raises(CheckpointError, match="ffn_hidden_size=16 is no RadioModel"):
        radio.config_to_hf(Config(**sizes))
