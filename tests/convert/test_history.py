"""The chain of stages is read from run folders, as far as they are there."""

import shutil

import pytest

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.convert.history import History, read_history
from tests.support.staged_runs import STAGES, write_stages


@pytest.fixture
def runs(make_run, model_config, tokenizer_path, tmp_path):
    write_stages(tmp_path, make_run(model_config), model_config, tokenizer_path)
    return tmp_path


def checkpoint_of(run):
    return run / "checkpoints" / "iter_0000025"


def test_the_history_goes_back_to_the_first_stage_up_to_each_checkpoint(runs):
    history = read_history(checkpoint_of(runs / "sft"))
    assert history.is_complete
    assert [stage.name for stage in history.stages] == list(STAGES)
    first, _, last = history.stages
    assert (last.iterations, last.rows, last.tokens, last.images) == (25, 100, 250, 75)
    assert last.losses == {"loss": 17.5, "loss/coyo": 2.0, "validation_loss": 1.25}
    assert (first.learned, last.learned) == ("all but vision_model, language_model", "all")
    coyo, mmc4 = last.datasets
    assert (coyo.name, coyo.used, coyo.samples) == ("coyo", "epochs 2", 25)
    assert (mmc4.name, mmc4.used, mmc4.samples) == ("mmc4", "images 1", None)


def test_a_history_that_breaks_off_says_so(runs):
    shutil.rmtree(runs / "align")
    history = read_history(checkpoint_of(runs / "sft"))
    assert not history.is_complete
    assert [stage.name for stage in history.stages] == ["pretrain", "sft"]


def test_a_stage_without_records_is_not_invented(runs):
    (runs / "sft" / "metrics.jsonl").unlink()
    last = read_history(checkpoint_of(runs / "sft")).stages[-1]
    assert (last.tokens, last.images, last.losses) == (None, None, {})


def test_runs_that_name_each_other_end(runs):
    config = checkpoint_of(runs / "align") / "config.yaml"
    config.write_text(config.read_text().replace("load_weights: null", "load_weights: sft"))
    assert len(read_history(checkpoint_of(runs / "sft")).stages) == 3


def test_weights_that_were_imported_have_no_history(make_run, model_config):
    assert read_history(read_run_settings(make_run(model_config)).checkpoint) == History()
