"""The card of an export says what its run folders say, and nothing else."""

import math
import shutil
from dataclasses import replace

import pytest
import yaml

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.convert.family import find_format
from megatron_vlm.convert.files.model_card import CARD_NAME, record_checks
from megatron_vlm.convert.to_hf import ExportOptions, export_model
from megatron_vlm.parallel.groups import single_process
from tests.support.staged_runs import write_stages


@pytest.fixture
def runs(make_run, model_config, tokenizer_path, tmp_path):
    write_stages(tmp_path, make_run(model_config), model_config, tokenizer_path)
    return tmp_path


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_of_a_trained_model(runs, tmp_path):
    settings = read_run_settings(runs / "sft")
    with single_process():
        for name in ("first", "second"):
            export_model(settings, tmp_path / name)
    card = (tmp_path / "first" / CARD_NAME).read_text()
    assert card == (tmp_path / "second" / CARD_NAME).read_text()
    assert front_matter(card) == {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["megatron_vlm", "clip"],
        "datasets": ["coyo", "mmc4"],
    }
    assert "| sft | 25 | 100 | 250 | 75 | all | 17.5000 |" in card
    assert "| align | mmc4 | images 1 | unknown | unknown | unknown |" in card
    assert "| pretrain | `validation_loss` | 1.2500 |" in card
    assert str(tmp_path) not in card


def test_parameters_are_those_of_rows_that_a_token_has(make_run, model_config, tmp_path):
    model = replace(model_config, language=replace(model_config.language, share_embeddings_and_output_weights=False))
    table = find_format("vila").rules(model)
    tensors = [shape for rule in table for _ in rule.layers for shape in rule.their_shapes()]
    with single_process():
        export_model(read_run_settings(make_run(model)), tmp_path / "x", ExportOptions(format="vila"))
    count = f"| parameters | {sum(map(math.prod, tensors)):,} |"
    assert model.language.padded_vocab_size > model.language.num_token_ids
    assert count in (tmp_path / "x" / CARD_NAME).read_text()


def test_verified_figures_replace_the_remark_that_there_are_none(exported, tmp_path):
    shutil.copy(exported / CARD_NAME, tmp_path)
    before = (tmp_path / CARD_NAME).read_text()
    assert "imported, not trained" in before
    assert "were not compared" in before
    for _ in range(2):
        record_checks(tmp_path, ["tensors: 9 of 9 equal to the bit", "logits: 1000 positions"])
        after = (tmp_path / CARD_NAME).read_text()
        assert "\n- tensors: 9 of 9 equal to the bit\n- logits: 1000 positions\n\n## Use\n" in after
        assert "were not compared" not in after
        assert after.split("## Use")[1] == before.split("## Use")[1]


def test_a_folder_without_a_card_gets_none(tmp_path):
    record_checks(tmp_path, ["tensors: 1 of 1 equal to the bit"])
    assert not list(tmp_path.iterdir())
