import hashlib

import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.data.text import tokenizer as interface
from megatron_vlm.data.text.tokenizer import is_marker, load_tokenizer
from tests.support.byte_pair import write_smollm2


def test_facts_come_from_the_file(tokenizer, tokenizer_path):
    facts = tokenizer.facts
    assert facts.sha256 == hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()
    assert (facts.name, facts.vocab_size, facts.bos_id, facts.eos_id) == ("tiny.model", 400, 1, 2)


def test_the_kind_follows_from_what_the_file_is(tokenizer_path, tmp_path):
    folder = write_smollm2(tmp_path / "json")
    assert load_tokenizer(folder).name == load_tokenizer(folder / "tokenizer.json").name == "tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_path.read_bytes())
    assert load_tokenizer(tmp_path).sha256 == load_tokenizer(tokenizer_path).sha256, "whatever the file's name is"


def test_files_of_no_known_kind_are_refused(tokenizer_path, monkeypatch):
    monkeypatch.setattr(interface, "module_names", lambda package: ())
    with pytest.raises(ConfigError, match="no tokenizer of a known kind"):
        load_tokenizer(tokenizer_path)


@pytest.mark.parametrize(("text", "found"), [("<|im_end|>", True), ("<s>", False), ("a<|b|>", False), ("<|>", False)])
def test_markers_are_known_by_their_form(text, found):
    assert is_marker(text) == found
