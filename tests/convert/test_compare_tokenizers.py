"""Two tokenizers are told to be the same only where every text and every special token is."""

import json
import shutil
from dataclasses import replace

import pytest

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.convert.compare_tokenizers import compare_tokenizers
from megatron_vlm.convert.opened_weights import OpenedWeights
from megatron_vlm.convert.to_hf import export_model
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.data.text.tokenizer_files import find_tokenizer
from tests.support.byte_pair import write_llama_3, write_smollm2
from tests.support.configs import tiny_model


def opened(folder, settings=None):
    """A model of which only the tokenizer is looked at."""
    found = find_tokenizer(folder) if folder.is_dir() else folder
    return OpenedWeights(path=folder, model=tiny_model(), tensors={}, settings=settings, tokenizer=found)


def edit(folder, name, change):
    path = folder / name
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


@pytest.mark.parametrize("write", [None, write_llama_3, write_smollm2])
def test_the_tokenizer_of_a_training_and_that_of_its_export_are_the_same(make_run, model_config, tmp_path, write):
    settings = read_run_settings(make_run(model_config))
    if write is not None:
        tokenizer = load_tokenizer(write(tmp_path))
        model = replace(model_config, language=replace(model_config.language, vocab_size=tokenizer.vocab_size))
        settings = replace(read_run_settings(make_run(model)), tokenizer=tokenizer.files.path)
    export_model(settings, tmp_path / "hf")
    found = compare_tokenizers(opened(settings.tokenizer, settings), opened(tmp_path / "hf"))
    assert found.faults == ()
    assert "are the same" in found.summary


def test_another_vocabulary_is_named_by_its_first_difference(exported, tmp_path):
    write_smollm2(tmp_path)
    found = compare_tokenizers(opened(exported), opened(tmp_path))
    assert found.faults[0].startswith("vocabularies have ")
    assert any(fault.startswith("BOS is 1 '<s>' and none") for fault in found.faults)
    assert any("has the ids" in fault for fault in found.faults)
    assert found.faults[-1].startswith("chat templates differ from character ")
    assert all(len(fault.splitlines()) == 1 for fault in found.faults)


def test_a_tokenizer_json_that_cuts_text_in_another_way_is_found(exported, copy):
    edit(copy, "tokenizer.json", lambda tree: tree["model"].update(merges=tree["model"]["merges"][20:]))
    (fault,) = compare_tokenizers(opened(exported), opened(copy)).faults
    assert "tokenizer.json differs from tokenizer.model: the text" in fault
    (copy / "tokenizer.json").write_text("{")
    (fault,) = compare_tokenizers(opened(exported), opened(copy)).faults
    assert "tokenizer.json cannot be read" in fault


def test_a_token_that_is_special_in_one_folder_only_is_found(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_smollm2(tmp_path / name)

    def make_special(config):
        config["added_tokens_decoder"] = {
            "40": {"content": load_tokenizer(tmp_path / "one").piece(40), "special": True}
        }

    edit(tmp_path / "other", "tokenizer_config.json", make_special)
    found = compare_tokenizers(opened(tmp_path / "one"), opened(tmp_path / "other"))
    assert any("is a control token in the second only" in fault for fault in found.faults)


def test_another_chat_template_is_shown_from_where_it_differs(exported, copy):
    path = copy / "chat_template.jinja"
    path.write_text(path.read_text().replace("USER", "HUMAN"))
    (fault,) = compare_tokenizers(opened(exported), opened(copy)).faults
    assert fault.startswith("chat templates differ from character ")
    assert fault.count("USER") == fault.count("HUMAN") == 1


def test_a_folder_without_a_tokenizer_is_named(exported, tmp_path):
    found = compare_tokenizers(opened(exported), opened(tmp_path))
    assert found.faults == ()
    assert str(tmp_path) in found.summary
