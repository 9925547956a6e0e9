"""VILA-1.0's flat layout, which is LLaVA-1.5's: in and out to the bit, with the tower's weights and without."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_vlm.checkpoint.folder import find_checkpoint
from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.checkpoint.tensors import hash_weights
from megatron_vlm.config import CheckpointError, config_to_dict
from megatron_vlm.config.presets import vision as vision_presets
from megatron_vlm.config.projectors import make_projector
from megatron_vlm.convert.families import vila_flat
from megatron_vlm.convert.from_hf import import_model
from megatron_vlm.convert.to_hf import ExportOptions, export_model
from tests.support.sentence_piece import NUM_PIECES
from tests.support.vila import flat_tensors, language_model, projection, randomise, save_flat, tower

FLAT = ExportOptions(format="vila-flat")
TOWER = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A language model, a projection, a tower that was trained, and the folder of the one that it came from."""
    clip = tmp_path_factory.mktemp("clip")
    tower("CLIP").save_pretrained(clip)
    torch.manual_seed(4)
    return language_model(NUM_PIECES), projection("mlp2x_gelu").eval(), randomise(tower("CLIP"), 5), clip


@pytest.mark.parametrize("with_tower", [True, False])
def test_a_published_folder_comes_in_and_goes_out_to_the_bit(with_tower, parts, tmp_path, tokenizer_path):
    language, layers, vision, clip = parts
    tensors = flat_tensors(language, layers, vision if with_tower else None)
    save_flat(tmp_path / "flat", tensors, language, "mlp2x_gelu")
    shutil.copy(tokenizer_path, tmp_path / "flat" / "tokenizer.model")
    model = import_model(tmp_path / "flat", tmp_path / "run", tower=clip)
    assert (model.projection.type, model.vision.num_layers_run, model.vision.image_size) == ("mlp2x_gelu", 2, 32)
    settings = read_run_settings(tmp_path / "run")
    export_model(settings, tmp_path / "hf", FLAT)
    written = load_file(tmp_path / "hf" / "model.safetensors")
    wanted = flat_tensors(language, layers, vision if with_tower else tower("CLIP"))
    for name, tensor in written.items():
        if not name.startswith(TOWER + "post_layernorm."):  # the features do not pass it: the identity
            assert torch.equal(tensor[: len(wanted[name])], wanted[name]), name
    unused = set(wanted) - set(written)
    assert all(name.startswith(TOWER + "encoder.layers.2.") for name in unused if not name.endswith("position_ids"))
    import_model(tmp_path / "hf", tmp_path / "again")
    assert hash_weights(read_run_settings(tmp_path / "again").checkpoint) == hash_weights(settings.checkpoint)


def test_older_names_are_read(parts, tmp_path):
    language, layers, vision, clip = parts
    tensors = flat_tensors(language, layers, vision)
    older = {
        name.replace("model.mm_projector.", "mm_projector.").replace("vision_tower.vision_tower.", "vision_tower."): one
        for name, one in tensors.items()
    }
    for name, held in (("new", tensors), ("old", older)):
        save_flat(tmp_path / name, held, language, "mlp2x_gelu")
        import_model(tmp_path / name, tmp_path / f"run_{name}", tower=clip)
    found = [hash_weights(find_checkpoint(tmp_path / f"run_{name}")) for name in ("new", "old")]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("with_tower", "name", "what"), [(False, "openai/clip-vit-large-patch14-336", "weights"), (True, "x/y", "settings")]
)
def test_a_tower_that_is_not_there_is_asked_for(with_tower, name, what, parts, tmp_path):
    language, layers, vision, _ = parts
    tensors = flat_tensors(language, layers, vision if with_tower else None)
    save_flat(tmp_path / "flat", tensors, language, "mlp2x_gelu", mm_vision_tower=name)
    with pytest.raises(CheckpointError, match=f"the {what} of the tower {name} are not in .* fix: .* --vision"):
        import_model(tmp_path / "flat", tmp_path / "run")


def test_a_tower_of_published_sizes_is_named(make_run, model_config, tmp_path, monkeypatch):
    (tmp_path / "tiny-clip.yaml").write_text(yaml.safe_dump(config_to_dict(model_config.vision)))
    monkeypatch.setattr(vision_presets, "__path__", [*vision_presets.__path__, str(tmp_path)])
    monkeypatch.setattr(vila_flat, "_PUBLISHED", {"openai/tiny": "tiny-clip"})
    model = replace(model_config, projection=make_projector("linear"))
    run = read_run_settings(make_run(model))
    export_model(run, tmp_path / "hf", FLAT)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["mm_vision_tower"], config["mm_vision_select_layer"]) == ("openai/tiny", -2)
    assert config["unfreeze_mm_vision_tower"]
    assert not (tmp_path / "hf" / "vision_tower").exists()
    assert "model.mm_projector.weight" in load_file(tmp_path / "hf" / "model.safetensors")
    import_model(tmp_path / "hf", tmp_path / "again")
    again = read_run_settings(tmp_path / "again")
    assert hash_weights(again.checkpoint) == hash_weights(run.checkpoint)
    assert again.model.vision == model.vision
