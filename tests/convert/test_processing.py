"""How a folder prepares images, and what it becomes for images of another size."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.checkpoint.tensors import read_tensor
from megatron_vlm.cli.main import main
from megatron_vlm.config import CheckpointConfig, CheckpointError, UsageError
from megatron_vlm.config.towers.s2 import Config as ScaledConfig
from megatron_vlm.convert.folder import read_settings
from megatron_vlm.convert.from_hf import ImportOptions, import_model, import_parts, open_model_folder
from megatron_vlm.convert.processing import at_image_size, with_processing
from tests.support.configs import tiny_run
from tests.support.jobs import start

OPTIONS = ImportOptions(projection="mlp2x_gelu", image_size=48)
POSITIONS = "model.vision_model.position_embeddings.weight"


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
    model = import_parts(llama_dir, clip_dir, tmp_path / "run", OPTIONS)
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
