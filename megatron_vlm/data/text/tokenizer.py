"""A SentencePiece tokenizer."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from megatron_vlm.config import ConfigError
from megatron_vlm.data.samples import TokenizerFacts
from megatron_vlm.data.text.words import WordEncoder, read_word_rule

# Serialised protobuf messages merge when they are concatenated. These bytes are a ModelProto that holds only
# normalizer_spec {add_dummy_prefix: false, remove_extra_whitespaces: false}.
_NO_PREFIX = bytes([0x1A, 0x04, 0x18, 0x00, 0x20, 0x00])
MODEL_FILE = "tokenizer.model"
"""Name of a SentencePiece model in a folder, a Hugging Face model's or a run's."""


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Load a SentencePiece model.

    Args:
        path: model file, or a folder (e.g. of a Hugging Face model) that holds `tokenizer.model`.

    Raises:
        ConfigError: the file is missing or not a SentencePiece model, or the model has no BOS or EOS.
    """
    file = Path(path)
    if file.is_dir():
        file = file / MODEL_FILE
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"tokenizer cannot be read: {error.strerror}", where=str(file), fix="give a SentencePiece .model file"
        ) from None
    if not content:
        raise ConfigError("tokenizer file is empty", where=str(file), fix="copy it again")
    return Tokenizer(content, str(file))


class Tokenizer:
    """Text to token ids and back, without BOS and EOS.

    Args:
        content: the serialised SentencePiece model.
        where: its path, for messages.
    """

    def __init__(self, content: bytes, where: str) -> None:
        self._content, self.name, self._where = content, Path(where).name, where
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._processor = self._load(content)
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        self.vocab_size = self._processor.vocab_size()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ConfigError(
                f"tokenizer has no {'BOS' if self.bos_id < 0 else 'EOS'} piece",
                where=where,
                fix="use a model trained with bos_id and eos_id, like Llama's",
            )

    def __reduce__(self) -> tuple:
        return (Tokenizer, (self._content, self._where))

    @property
    def facts(self) -> TokenizerFacts:
        """Facts for a manifest."""
        return TokenizerFacts(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TokenizerFacts)})

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        """Return the ids of `text`, without BOS and EOS.

        Args:
            text: any text; names of control tokens in it are plain text.
            continuation: whether the text directly follows other tokens. If so, the word-begin mark that Llama's
                tokenizer puts before a text is omitted (Hugging Face calls this `legacy=False`).
        """
        if self._words is not None:
            return self._words.encode(text, continuation=continuation)
        return (self._continuing if continuation else self._processor).encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; BOS and EOS have none."""
        return self._processor.decode([int(token) for token in ids])

    def piece(self, token: int) -> str:
        """Return the name of one token, e.g. "▁the"."""
        return self._processor.id_to_piece(int(token))

    def piece_id(self, piece: str) -> int | None:
        """Return the id of the piece with exactly this name, or None."""
        token = self._processor.piece_to_id(piece)
        return None if self._processor.is_unknown(token) and piece != self.piece(token) else int(token)

    @functools.cached_property
    def _words(self) -> WordEncoder | None:
        adds_blank = read_word_rule(self._content, self._processor)
        return None if adds_blank is None else WordEncoder(self._continuing, adds_blank=adds_blank)

    @functools.cached_property
    def _continuing(self) -> sentencepiece.SentencePieceProcessor:
        return self._load(self._content + _NO_PREFIX)

    def _load(self, content: bytes) -> sentencepiece.SentencePieceProcessor:
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, ValueError):
            raise ConfigError(
                "file is not a SentencePiece model", where=self._where, fix="give a SentencePiece .model file"
            ) from None
