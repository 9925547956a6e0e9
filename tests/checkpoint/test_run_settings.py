import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_vlm.checkpoint.open_model import open_model
from megatron_vlm.checkpoint.run_settings import check_resume, check_start, read_run_settings
from megatron_vlm.config import CheckpointError, ConfigError, save_config
from megatron_vlm.config.adapters.lora import Config as Lora
from megatron_vlm.config.adapters.visual_expert import Config as VisualExpert
from megatron_vlm.config.projectors import make_projector
from megatron_vlm.data.text.tokenizer import load_tokenizer
from tests.support.configs import tiny_model, tiny_model_with_tower, tiny_run
from tests.support.random_run import write_random_run
from tests.support.sentence_piece import NUM_PIECES, train_sentence_piece


@pytest.fixture
def run(tmp_path):
    (tmp_path / "recorded.model").write_bytes(b"")
    write_random_run(tmp_path / "run", tiny_model(), tmp_path / "recorded.model")
    return tmp_path / "run"


def test_settings_are_those_of_the_newest_checkpoint(run):
    settings = read_run_settings(run)
    assert settings.checkpoint == run / "checkpoints" / "iter_0000000"
    assert settings.model == tiny_model()
    assert (settings.tokenizer.name, settings.image_aspect) == ("recorded.model", "pad")


def test_a_tokenizer_in_the_run_goes_before_the_recorded_one(run):
    (run / "tokenizer.model").write_bytes(b"")
    assert read_run_settings(run).tokenizer == run / "tokenizer.model"


def test_given_settings_go_before_those_of_the_run(run, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    settings = read_run_settings(run, tokenizer=str(tmp_path), image_aspect="square")
    assert (settings.tokenizer, settings.image_aspect) == (tmp_path / "tokenizer.model", "square")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A tokenizer, another of as many pieces, and a copy of the first."""
    made = [train_sentence_piece(tmp_path_factory.mktemp("tokenizer"), symbols=s) for s in ([], ["<other>"])]
    made.append(Path(shutil.copy(made[0], made[0].parent / "copy.model")))
    assert len({load_tokenizer(path).vocab_size for path in made}) == 1
    return made


def test_another_tokenizer_of_the_same_size_is_refused(tokenizers, tmp_path):
    own, other, copy = tokenizers
    write_random_run(tmp_path / "run", tiny_model(vocab_size=NUM_PIECES), own)
    assert read_run_settings(tmp_path / "run", tokenizer=str(copy)).tokenizer == copy
    hashes = [load_tokenizer(path).sha256[:12] for path in (other, own)]
    message = rf"tokenizer {other} \(sha256 {hashes[0]}, .*not the run's own \(sha256 {hashes[1]}.*omit --tokenizer"
    with pytest.raises(ConfigError, match=message):
        read_run_settings(tmp_path / "run", tokenizer=str(other.parent))


def test_a_given_tokenizer_takes_the_place_of_one_that_is_damaged_or_gone(run, tokenizers, caplog):
    assert read_run_settings(run, tokenizer=str(tokenizers[0])).tokenizer == tokenizers[0]
    assert "own tokenizer cannot be compared" in caplog.text
    (run.parent / "recorded.model").unlink()
    assert read_run_settings(run, tokenizer=str(tokenizers[0])).tokenizer == tokenizers[0]


def test_a_tokenizer_that_is_gone_names_the_option(run):
    (run.parent / "recorded.model").unlink()
    with pytest.raises(ConfigError, match=r"recorded.model does not exist .*fix: name it with --tokenizer"):
        read_run_settings(run)


def test_a_checkpoint_without_settings_is_refused(run):
    (run / "checkpoints" / "iter_0000000" / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match="checkpoint has no config.yaml"):
        read_run_settings(run)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "missing section model"), ("model: [", "is not valid YAML"), ("model:\n\t", "is not valid YAML")],
)
def test_settings_that_are_cut_off_are_an_error_of_the_file(run, content, message):
    path = run / "checkpoints" / "iter_0000000" / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"{message}.*iter_0000000/config.yaml"):
        read_run_settings(run)


def test_open_model_starts_a_job_and_ends_it(run):
    with open_model(read_run_settings(run)) as model:
        assert torch.distributed.get_world_size() == 1
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not torch.distributed.is_initialized()


def test_open_model_computes_in_the_precision_that_is_asked_for(run):
    with open_model(read_run_settings(run), "bf16") as model:
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_open_model_refuses_a_damaged_checkpoint(run):
    file = next((run / "checkpoints" / "iter_0000000").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"), open_model(read_run_settings(run)):
        pass


def test_open_model_refuses_a_rank_of_a_larger_job(run, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="open_model needs a process of its own"), open_model(read_run_settings(run)):
        pass


@pytest.fixture
def record(tmp_path):
    """Return what writes the settings of a checkpoint, and returns its folder."""

    def write(**model):
        save_config(replace(tiny_run(), model=replace(tiny_model(), **model)), tmp_path / "config.yaml")
        return tmp_path

    return write


def run_with(**model):
    return replace(tiny_run(), model=replace(tiny_model(), **model))


def test_a_run_goes_on_with_its_own_settings_at_another_layout(record):
    other = replace(tiny_run(parallel={"tensor_model_parallel_size": 2}, optimizer={"lr": 5.0}), run_dir="moved")
    check_resume(record(), replace(other, model=replace(tiny_model(), backend="auto")))


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ({"adapter": Lora(alpha=16.0)}, {"adapter": Lora(alpha=32.0)}, "model.adapter.alpha is 32.0, .* with 16.0"),
        ({"adapter": Lora()}, {"adapter": VisualExpert()}, "model.adapter.type is visual_expert, .* with lora"),
        ({"adapter": Lora()}, {}, "model.adapter.type is None, the run was trained with lora"),
        (
            {"projection": make_projector("downsample")},
            {"projection": replace(make_projector("downsample"), token_order="column")},
            "model.projection.token_order is column, the run was trained with row",
        ),
    ],
)
def test_a_run_does_not_go_on_with_another_model(record, was, now, message):
    with pytest.raises(ConfigError, match=message) as error:
        check_resume(record(**was), run_with(**now))
    assert error.value.fix == "restore it"
    assert error.value.where is not None


def test_a_run_does_not_go_on_with_images_of_another_shape(record):
    config = tiny_run()
    with pytest.raises(ConfigError, match="data.image_aspect is square, the run was trained with pad"):
        check_resume(record(), replace(config, data=replace(config.data, image_aspect="square")))


def test_what_a_new_stage_may_change_is_told_to_who_resumes(record):
    larger = tiny_model_with_tower("clip", image_size=64)
    with pytest.raises(ConfigError, match="model.vision.image_size is 64") as error:
        check_resume(record(), replace(tiny_run(), model=larger))
    assert "checkpoint.load_weights" in error.value.fix
    assert len(str(error.value)) <= 300


def test_a_stage_may_have_more_tokens_more_scales_or_an_adapter(record, caplog):
    check_start(record(), replace(tiny_model_with_tower("s2", drop_class_token=False), adapter=Lora()))
    assert "model.vision.tower.drop_class_token is False, the weights were trained with True" in caplog.text


def test_a_stage_may_have_another_tower_and_projection(record, caplog):
    with caplog.at_level(logging.WARNING):
        check_start(record(), replace(tiny_model_with_tower("siglip"), projection=make_projector("linear")))
    assert [message.split(" (")[0] for message in caplog.messages] == [
        "model.projection.type is linear, the weights were trained with mlp2x_gelu",
        "model.vision.type is siglip, the weights were trained with clip",
    ]


@pytest.mark.parametrize(
    ("was", "now", "key"),
    [
        ({"adapter": Lora(alpha=16.0)}, {"adapter": Lora(alpha=32.0)}, "model.adapter.alpha"),
        ({}, {"vision": tiny_model_with_tower("clip", activation="gelu").vision}, "model.vision.activation"),
    ],
)
def test_a_stage_does_not_start_where_weights_mean_something_else(record, was, now, key):
    with pytest.raises(ConfigError, match=f"{key} is .*fix: set it to the value of the weights"):
        check_start(record(**was), run_with(**now).model)
