"""Checkpoints with random weights and no two alike, and the folders that they become."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.config import ModelConfig
from megatron_vlm.convert.from_hf import ImportOptions, import_parts
from megatron_vlm.convert.to_hf import export_model
from tests.support.configs import tiny_model
from tests.support.llama_folders import save_llama
from tests.support.random_run import write_random_run
from tests.support.sentence_piece import NUM_PIECES, train_sentence_piece


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    return train_sentence_piece(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def model_config() -> ModelConfig:
    return tiny_model(vocab_size=NUM_PIECES)


@pytest.fixture(scope="session")
def make_run(tmp_path_factory, tokenizer_path):
    """Return a run with random weights, made once for each model and only to be read: make_run(model)."""
    made: dict[str, Path] = {}

    def make(model: ModelConfig) -> Path:
        if str(model) not in made:
            made[str(model)] = tmp_path_factory.mktemp("run")
            write_random_run(made[str(model)], model, tokenizer_path)
        return made[str(model)]

    return make


@pytest.fixture(scope="session")
def exported(make_run, model_config, tmp_path_factory) -> Path:
    """A folder exported with default options, only to be read."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export_model(read_run_settings(make_run(model_config)), folder)
    return folder


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory, tokenizer_path) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), tokenizer_path)


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, initializer_factor=8.0)
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def imported(llama_dir, clip_dir, tmp_path_factory):
    """The run of both folders, only to be read."""
    run = tmp_path_factory.mktemp("imported")
    import_parts(llama_dir, clip_dir, run, ImportOptions(projection="mlp2x_gelu"))
    return run


@pytest.fixture
def with_vision():
    """Return a model with other settings of the tower: with_vision(model, feature_layer=-1)."""

    def change(model: ModelConfig, **settings) -> ModelConfig:
        return replace(model, vision=replace(model.vision, **settings))

    return change
