"""SentencePiece models, such as Llama 2's and Yi's, alone or with the tokens that a Hugging Face folder adds."""

import functools
from collections.abc import Sequence
from typing import Any

import sentencepiece

from megatron_vlm.config import ConfigError
from megatron_vlm.data.text import tokenizer as interface
from megatron_vlm.data.text.protobuf import make_control_pieces
from megatron_vlm.data.text.tokenizer_files import TokenizerFiles, TokenizerSettings, fingerprint
from megatron_vlm.data.text.words import WordEncoder, read_word_rule

# Serialised protobuf messages merge when they are concatenated. These bytes are a ModelProto that holds only
# normalizer_spec {add_dummy_prefix: false, remove_extra_whitespaces: false}.
_NO_PREFIX = bytes([0x1A, 0x04, 0x18, 0x00, 0x20, 0x00])
_WORD_BEGIN = "▁"


def recognises(files: TokenizerFiles) -> bool:
    """Tell whether the files hold a SentencePiece model, which no mark tells from other binary files."""
    return not files.is_json


class Tokenizer(interface.Tokenizer):
    """A SentencePiece model; ids behind its own are tokens that the folder adds, all of them control tokens."""

    def __init__(self, files: TokenizerFiles) -> None:
        self.files = files
        settings = files.settings()
        # Pieces that users defined are found in any text, unless they are control pieces.
        self._content = make_control_pieces(
            files.model, lambda piece: interface.is_marker(piece) or piece in settings.control
        )
        self._processor = self._load(self._content)
        self._num_pieces = self._processor.vocab_size()
        self._added = self._find_added(settings)
        self._texts = {token: text for text, token in self._added.items()}
        self.vocab_size = max([self._num_pieces, *(token + 1 for token in self._texts)])
        bos = self._find_end("BOS", settings.bos, self._processor.bos_id())
        self.bos_id = None if settings.adds_bos is False else bos
        self.eos_id = self._find_end("EOS", settings.eos, self._processor.eos_id())
        self.sha256 = fingerprint(files.model, self._facts_beside())

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        """Return the ids of `text`, without BOS and EOS."""
        if self._words is not None:
            return self._words.encode(text, continuation=continuation)
        return (self._continuing if continuation else self._processor).encode(text)

    def decode(self, ids: Sequence[int], *, continuation: bool = False) -> str:
        """Return the text of ids; control tokens have none."""
        pieces = [int(token) for token in ids if not self.is_control(token)]
        begins_with_blank = continuation and pieces and self.piece(pieces[0]).startswith(_WORD_BEGIN)
        return " " * bool(begins_with_blank) + self._processor.decode(pieces)

    def piece(self, token: int) -> str:
        """Return the name of one token."""
        if token < self._num_pieces:
            return self._processor.id_to_piece(int(token))
        return self._texts.get(int(token), f"<|unused_{token}|>")

    def piece_id(self, piece: str) -> int | None:
        """Return the id of the token with exactly this name, or None."""
        if piece in self._added:
            return self._added[piece]
        token = self._processor.piece_to_id(piece)
        return None if self._processor.is_unknown(token) and piece != self.piece(token) else int(token)

    def is_control(self, token: int) -> bool:
        """Tell whether no text is encoded to this id."""
        return token >= self._num_pieces or self._processor.is_control(int(token))

    def _find_added(self, settings: TokenizerSettings) -> dict[str, int]:
        """Return the tokens behind the model's own, without those for images and padding at the end."""
        added = {text: token for text, token in settings.tokens.items() if token >= self._num_pieces}
        for text, _ in sorted(added.items(), key=lambda entry: -entry[1]):
            if text not in settings.placeholders - {settings.bos, settings.eos}:
                break
            del added[text]
        return added

    def _find_end(self, what: str, named: str | None, own: int) -> int:
        found = own if named is None else self.piece_id(named)
        if found is None or found < 0:
            what = f"tokenizer has no {what} piece" if named is None else f"tokenizer has no token {named}, its {what}"
            fix = "use a model trained with bos_id and eos_id, like Llama's"
            raise ConfigError(what, where=str(self.files.path), fix=fix)
        return found

    def _facts_beside(self) -> dict[str, Any]:
        """Return what the files beside the model change."""
        facts = {"bos_id": (self.bos_id, self._processor.bos_id()), "eos_id": (self.eos_id, self._processor.eos_id())}
        changed: dict[str, Any] = {name: ours for name, (ours, own) in facts.items() if ours != own}
        return {**changed, **({"added": self._added} if self._added else {})}

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
                "file is not a SentencePiece model",
                where=str(self.files.path),
                fix="give a SentencePiece model or a tokenizer.json",
            ) from None
