"""Text to token ids and back: what every kind of tokenizer offers, and how a file becomes one.

The kinds are the modules of `data/text/tokenizers/`.
"""

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from megatron_vlm.config import ConfigError
from megatron_vlm.config.modules import find_module, module_names
from megatron_vlm.data.samples import TokenizerFacts
from megatron_vlm.data.text.tokenizer_files import TokenizerFiles, read_tokenizer_files

KINDS = "megatron_vlm.data.text.tokenizers"
_MARKER = re.compile(r"<\|.*\|>", re.DOTALL)


class Tokenizer(ABC):
    """Text to token ids and back, without BOS and EOS.

    A control token is an id that no text is encoded to, whatever the text spells; templates write it by its name. These
    are the tokens that the files call special, and those written `<|like this|>`. The tokens for images and padding at
    the end of a vocabulary belong to the model, which adds its own there: `vocab_size` does not count them.
    """

    files: TokenizerFiles
    sha256: str
    """Of the model file, and of the settings beside it if these change anything."""
    vocab_size: int
    """The highest id is below it."""
    bos_id: int | None
    """Token at the beginning of a sample; None for a tokenizer that begins without one, like SmolLM2's."""
    eos_id: int
    """Token at the end of a sample."""

    @property
    def name(self) -> str:
        """Name of the model file."""
        return self.files.path.name

    @property
    def kind(self) -> str:
        """Name of its module."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def bos(self) -> str:
        """Text of BOS; empty if there is none."""
        return "" if self.bos_id is None else self.piece(self.bos_id)

    @property
    def facts(self) -> TokenizerFacts:
        """Facts for a manifest."""
        return TokenizerFacts(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TokenizerFacts)})

    def __reduce__(self) -> tuple:
        return (type(self), (self.files,))

    @abstractmethod
    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        """Return the ids of `text`, without BOS and EOS.

        Args:
            text: any text; names of control tokens in it are plain text.
            continuation: whether the text directly follows other tokens. If so, the word-begin mark that Llama's
                tokenizer puts before a text is omitted (Hugging Face calls this `legacy=False`).
        """

    @abstractmethod
    def decode(self, ids: Sequence[int], *, continuation: bool = False) -> str:
        """Return the text of ids; control tokens have none.

        Args:
            ids: token ids.
            continuation: whether they follow other tokens. If not, the word-begin mark of the first one is no blank.
        """

    @abstractmethod
    def piece(self, token: int) -> str:
        """Return the name of one token, e.g. "▁the"."""

    @abstractmethod
    def piece_id(self, piece: str) -> int | None:
        """Return the id of the token with exactly this name, or None."""

    @abstractmethod
    def is_control(self, token: int) -> bool:
        """Tell whether no text is encoded to this id."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: a SentencePiece model; a tokenizer.json; or a folder, e.g. of a Hugging Face model, that holds one.

    Raises:
        ConfigError: there is none, it is damaged or of an unknown kind, or it has no EOS.
    """
    files = read_tokenizer_files(path)
    kinds = [find_module(KINDS, name, "kind of tokenizer") for name in module_names(KINDS)]
    kind = next((kind for kind in kinds if kind.recognises(files)), None)
    if kind is None:
        fix = "give a SentencePiece model (tokenizer.model) or a tokenizer.json"
        raise ConfigError("file is no tokenizer of a known kind", where=str(files.path), fix=fix)
    return kind.Tokenizer(files)


def is_marker(text: str) -> bool:
    """Tell whether a token is a control token by its name, e.g. "<|im_end|>"."""
    return _MARKER.fullmatch(text) is not None
