import pickle

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.config import ConfigError
from megatron_vlm.data.text.tokenizer import load_tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_a_text_is_its_continuation_after_one_blank(tokenizer, text):
    assert tokenizer.encode(text) == (tokenizer.encode(" " + text, continuation=True) if text else [])


@pytest.mark.parametrize("text", ["<image>", "<s>", "</s>", "<unk>"])
def test_names_of_control_tokens_are_plain_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == text


def test_facts_come_from_the_file(tokenizer, tokenizer_path):
    import hashlib

    facts = tokenizer.facts
    assert facts.sha256 == hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()
    assert (facts.name, facts.vocab_size, facts.bos_id, facts.eos_id) == ("tiny.model", 400, 1, 2)


def test_piece_id_is_none_for_a_name_that_is_no_piece(tokenizer):
    assert tokenizer.piece(tokenizer.piece_id("<|im_end|>")) == "<|im_end|>"
    assert tokenizer.piece_id("<|eot_id|>") is None
    assert tokenizer.piece_id("<unk>") == 0


def test_a_pickled_tokenizer_encodes_the_same(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a red cat") == tokenizer.encode("a red cat")


def test_a_folder_with_a_tokenizer_model_is_loaded(tokenizer_path, tmp_path, tokenizer):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256


def test_missing_file_names_the_fix(tmp_path):
    with pytest.raises(ConfigError, match="No such file.*none.model.*fix: give a SentencePiece"):
        load_tokenizer(tmp_path / "none.model")


def test_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        load_tokenizer(path)


def test_model_without_eos_is_refused(tmp_path):
    prefix = tmp_path / "bare"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f"] * 5), model_prefix=str(prefix), vocab_size=9, eos_id=-1, minloglevel=2
    )
    with pytest.raises(ConfigError, match="has no EOS piece"):
        load_tokenizer(prefix.with_suffix(".model"))


def test_an_empty_tokenizer_file_is_named_as_such(tmp_path):
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"tokenizer file is empty \(.*empty.model\)"):
        load_tokenizer(tmp_path / "empty.model")
