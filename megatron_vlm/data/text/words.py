"""Tokenise word by word and cache the words, for models where this gives the same ids as SentencePiece.

In a model like Llama's (BPE without normalisation, pieces with the blank mark only at their start) no piece crosses
from one word into the next, so the ids of a text are the ids of its words, one after the other. Most of any real text
consists of few different words, and looking them up is several times faster than merging their characters again.
"""

import re
from itertools import chain
from typing import Any

import sentencepiece

from megatron_vlm.data.text.protobuf import read_fields

_BLANK_MARK = "▁"
_WORD = re.compile(f"{_BLANK_MARK}*[^{_BLANK_MARK}]+|{_BLANK_MARK}+")
_CROSSES = re.compile(f"[^{_BLANK_MARK}]{_BLANK_MARK}| ")
_MAX_WORDS = 100_000  # up to 35 MB per process; words beyond that are tokenised every time
_MAX_CHARACTERS = 24  # longer words rarely repeat, and scripts without blanks would fill the cache with sentences

# Field numbers of sentencepiece_model.proto.
_SPECS = (2, 3)  # how the model was trained, how it normalises
_MODEL_TYPE, _MARK_IS_SUFFIX, _BYTE_FALLBACK, _BPE = 3, 24, 35, 2
_CHARACTER_MAP, _ADDS_BLANK, _REMOVES_BLANKS, _MARKS_BLANKS = 2, 3, 4, 5


class WordEncoder:
    """Encode text by its words.

    Args:
        continuing: the model, changed so that it puts no blank before a text.
        adds_blank: whether the unchanged model puts one there.
    """

    def __init__(self, continuing: sentencepiece.SentencePieceProcessor, *, adds_blank: bool) -> None:
        self._words = _Words(continuing)
        self._blank = _BLANK_MARK if adds_blank else ""

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        """Return the ids of `text`; with `continuation`, no blank is put before it."""
        marked = text.replace(" ", _BLANK_MARK)
        if text and not continuation:
            marked = self._blank + marked
        return list(chain.from_iterable(map(self._words.__getitem__, _WORD.findall(marked))))


class _Words(dict[str, tuple[int, ...]]):
    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        super().__init__()
        self._processor = processor

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(self._processor.encode(word))
        if len(word) <= _MAX_CHARACTERS and len(self) < _MAX_WORDS:
            self[word] = ids
        return ids


def read_word_rule(content: bytes, processor: sentencepiece.SentencePieceProcessor) -> bool | None:
    """Tell whether a model encodes words independently of each other.

    Args:
        content: the serialised SentencePiece model.
        processor: the same model.

    Returns:
        None if it does not; otherwise whether it puts a blank before a text.
    """
    specs = {number: _values(value) for number, value in _values(content).items() if number in _SPECS}
    trainer, normalizer = (specs.get(number, {}) for number in _SPECS)
    # The second argument is the default of a field that the file omits.
    plain = not normalizer.get(_CHARACTER_MAP) and normalizer.get(_MARKS_BLANKS, 1)
    if not plain or normalizer.get(_REMOVES_BLANKS, 1) or trainer.get(_MARK_IS_SUFFIX):
        return None
    # Without byte fallback, neighbouring unknown characters become one id, even across words.
    if trainer.get(_MODEL_TYPE) != _BPE or not trainer.get(_BYTE_FALLBACK):
        return None
    ids = list(range(processor.vocab_size()))
    # How an unused piece is split depends on the merges before it.
    if any(processor.is_unused(ids)) or any(map(_CROSSES.search, processor.id_to_piece(ids))):
        return None
    return bool(normalizer.get(_ADDS_BLANK, 1))


def _values(message: Any) -> dict[int, Any]:
    """Return the fields of a protobuf message by number; of repeated ones the last."""
    return {field.number: field.value for field in read_fields(message)}
