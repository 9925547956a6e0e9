"""SentencePiece models, alone and in the folders of Hugging Face."""

import json
import pickle

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.config import ConfigError
from megatron_vlm.data.text.tokenizer import load_tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40)


@pytest.fixture
def folder(tokenizer_path, tmp_path):
    """A folder with the model under its usual name."""
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    return tmp_path


def write(folder, name, record) -> None:
    (folder / name).write_text(json.dumps(record))


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, continuation=True), continuation=True) == text


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_a_text_is_its_continuation_after_one_blank(tokenizer, text):
    assert tokenizer.encode(text) == (tokenizer.encode(" " + text, continuation=True) if text else [])


@pytest.mark.parametrize("text", ["<image>", "<s>", "</s>", "<unk>", "<|im_end|>\n<|im_start|>system"])
@pytest.mark.parametrize("continuation", [True, False])
def test_names_of_control_tokens_are_plain_text(tokenizer, text, continuation):
    ids = tokenizer.encode(text, continuation=continuation)
    assert not any(map(tokenizer.is_control, ids))
    assert 0 not in ids
    assert tokenizer.decode(ids) == text


def test_piece_id_is_none_for_a_name_that_is_no_piece(tokenizer):
    assert tokenizer.piece(tokenizer.piece_id("<|im_end|>")) == "<|im_end|>"
    assert tokenizer.is_control(tokenizer.piece_id("<|im_end|>"))
    assert tokenizer.piece_id("<|eot_id|>") is None
    assert tokenizer.piece_id("<unk>") == 0


def test_a_pickled_tokenizer_encodes_the_same(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a red cat") == tokenizer.encode("a red cat")


def test_settings_that_say_what_the_model_says_change_nothing(folder, tokenizer):
    decoder = {"1": {"content": "<s>", "special": True}, "2": {"content": "</s>", "special": True}}
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}
    write(folder, "tokenizer_config.json", config | {"added_tokens_decoder": decoder})
    assert load_tokenizer(folder).sha256 == tokenizer.sha256


def test_tokens_behind_the_model_are_found_by_name_only(folder, tokenizer):
    write(folder, "added_tokens.json", {"<im_start>": 400, "<|eot|>": 402})
    found = load_tokenizer(folder)
    assert found.vocab_size == 403
    assert [found.piece_id("<im_start>"), found.piece_id("<|eot|>")] == [400, 402]
    assert [found.piece(token) for token in (399, 400, 401)] == [tokenizer.piece(399), "<im_start>", "<|unused_401|>"]
    assert found.is_control(400)
    assert found.encode("<im_start>a<|eot|>") == tokenizer.encode("<im_start>a<|eot|>")
    assert found.decode([400, *tokenizer.encode("a cat"), 402]) == "a cat"
    assert found.sha256 != tokenizer.sha256


def test_tokens_for_images_and_padding_at_the_end_belong_to_the_model(folder, tokenizer):
    write(folder, "tokenizer_config.json", {"pad_token": "<pad>"})
    write(folder, "added_tokens.json", {"<image>": 400, "<pad>": 401})
    assert load_tokenizer(folder).sha256 == tokenizer.sha256
    assert load_tokenizer(folder).vocab_size == 400
    write(folder, "added_tokens.json", {"<image>": 400, "<pad>": 401, "<extra>": 402})
    assert load_tokenizer(folder).vocab_size == 403


def test_a_padding_token_that_also_ends_samples_is_no_placeholder(folder):
    write(folder, "tokenizer_config.json", {"pad_token": "<|end|>", "eos_token": "<|end|>"})
    write(folder, "added_tokens.json", {"<|end|>": 400})
    assert load_tokenizer(folder).eos_id == 400


def test_yi_takes_bos_off_and_ends_samples_with_a_piece_of_its_own(folder, tokenizer):
    """The settings of Nous-Hermes-2-Yi: no BOS, and `<|im_end|>`, a piece that users defined, as EOS."""
    write(folder, "tokenizer_config.json", {"add_bos_token": False, "eos_token": "<|im_end|>"})
    found = load_tokenizer(folder)
    assert (found.bos_id, found.eos_id) == (None, tokenizer.piece_id("<|im_end|>"))
    assert found.sha256 != tokenizer.sha256


def test_pieces_that_users_defined_are_found_in_text_unless_they_are_special(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f"] * 5),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=12,
        user_defined_symbols=["[one]", "[two]"],
        minloglevel=2,
    )
    write(tmp_path, "special_tokens_map.json", {"additional_special_tokens": ["[two]"]})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.piece_id("[one]") in tokenizer.encode("[one]")
    assert tokenizer.piece_id("[two]") not in tokenizer.encode("[two]")


def test_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(
        ConfigError, match="not a SentencePiece model.*fix: give a SentencePiece model or a tokenizer.json"
    ):
        load_tokenizer(tmp_path)


def test_model_without_eos_is_refused(tmp_path):
    prefix = tmp_path / "bare"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f"] * 5), model_prefix=str(prefix), vocab_size=9, eos_id=-1, minloglevel=2
    )
    with pytest.raises(ConfigError, match="has no EOS piece"):
        load_tokenizer(prefix.with_suffix(".model"))


def test_settings_that_name_a_token_that_is_not_there_are_refused(folder):
    write(folder, "tokenizer_config.json", {"eos_token": "<|end|>"})
    with pytest.raises(ConfigError, match=r"has no token <\|end\|>, its EOS"):
        load_tokenizer(folder)
