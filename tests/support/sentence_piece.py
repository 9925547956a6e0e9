"""A small SentencePiece model of Llama's kind: BPE, byte fallback, no normalisation."""

from collections.abc import Sequence
from pathlib import Path

import sentencepiece

NUM_PIECES = 400
_TEXT = """\
What colour is the circle in the picture? The circle is red. Is there a triangle? No, there is a blue rectangle.
A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed answers.
How many shapes are on the left side? Three shapes; two squares and one small yellow circle, 12 pixels wide.
Question and answer: yes or no, black or white, green or grey, above or below, left or right, one two three four five.
The photo shows a brown dog and a cat on a bench near the river. A man reads the newspaper under a tree in autumn.
"""


def train_sentence_piece(folder: Path, *, symbols: Sequence[str] = ()) -> Path:
    """Train the model on a few sentences and return its file.

    Args:
        folder: to write to.
        symbols: pieces that a text is cut at, such as the markers of a chat template; part of the `NUM_PIECES`.
    """
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT.splitlines() * 3),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=NUM_PIECES,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        character_coverage=1.0,
        user_defined_symbols=list(symbols),
        minloglevel=2,
    )
    return folder / "tokenizer.model"
