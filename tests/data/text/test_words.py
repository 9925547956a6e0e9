"""Word by word, a text gets the ids that SentencePiece gives it as a whole."""

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.data.text.tokenizer_files import TokenizerFiles
from megatron_vlm.data.text.tokenizers.sentence_piece import Tokenizer
from megatron_vlm.data.text.words import read_word_rule

CORPUS = ["the red cat  sat on the mat", "a cat, the 12 mats; a red hat", "Grüße an 猫 and ▁ dogs\nand the  end "] * 3
FRAGMENTS = ["  ", "▁", "\n", "\t", "猫", "é", "\0", "cat", "the", "red", "<end>", "<|end|>", "12"]
TEXTS = st.lists(
    st.one_of(st.just(" "), st.sampled_from(FRAGMENTS), st.characters(exclude_categories=["Cs"])), max_size=40
).map("".join)


def train(**options) -> bytes:
    stream = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "vocab_size": 310,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=stream, **{**defaults, **options}
    )
    return stream.getvalue()


def load(content: bytes) -> Tokenizer:
    return Tokenizer(TokenizerFiles(Path("memory"), content, {}))


LLAMA_LIKE = {
    "plain": {},
    "no blank before a text": {"add_dummy_prefix": False},
    "pieces of users": {"user_defined_symbols": ["<end>", "cat"]},
    "pieces of blanks": {"allow_whitespace_only_pieces": True},
}


@pytest.fixture(scope="module")
def models():
    return {name: train(**options) for name, options in LLAMA_LIKE.items()}


@pytest.mark.parametrize("name", LLAMA_LIKE)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_ids_are_those_of_the_whole_text(models, name, text):
    tokenizer = load(models[name])
    assert tokenizer._words is not None
    whole = sentencepiece.SentencePieceProcessor(model_proto=models[name])
    assert tokenizer.encode(text) == whole.encode(text)
    assert tokenizer.encode(text, continuation=True) == tokenizer._continuing.encode(text)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "vocab_size": 300},
        {"byte_fallback": False, "vocab_size": 60},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True},
        {"split_by_whitespace": False, "vocab_size": 330},
        {"user_defined_symbols": ["red▁cat"]},
    ],
    ids=str,
)
def test_a_model_that_may_cross_words_encodes_the_whole_text(options):
    content = train(**options)
    whole = sentencepiece.SentencePieceProcessor(model_proto=content)
    assert read_word_rule(content, whole) is None
    text = " the red cat sat  on the mat "
    assert load(content).encode(text) == whole.encode(text)


def test_long_words_are_not_kept_in_memory(models):
    tokenizer = load(models["plain"])
    tokenizer.encode("cat " + "x" * 1000)
    assert set(tokenizer._words._words) == {"▁cat"}
