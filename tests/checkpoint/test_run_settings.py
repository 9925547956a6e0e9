import pytest
import torch

from megatron_vlm.checkpoint.open_model import open_model
from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.config import CheckpointError, ConfigError
from tests.support.configs import tiny_model
from tests.support.random_run import write_random_run


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


def test_a_tokenizer_that_is_gone_names_the_option(run):
    (run.parent / "recorded.model").unlink()
    with pytest.raises(ConfigError, match=r"recorded.model does not exist .*fix: name it with --tokenizer"):
        read_run_settings(run)


def test_a_checkpoint_without_settings_is_refused(run):
    (run / "checkpoints" / "iter_0000000" / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match="checkpoint has no config.yaml"):
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
