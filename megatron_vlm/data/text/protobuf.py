"""Read serialised SentencePiece models; their own Python module is tied to one version of protobuf.

Field numbers are those of sentencepiece_model.proto.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_PIECES = 1
_TEXT, _TYPE = 1, 3
_CONTROL, _USER_DEFINED = 3, 4


class Field(NamedTuple):
    """One field of a message."""

    number: int
    value: Any
    """An int, or the bytes of a text or of an inner message."""
    end: int
    """Where it ends in the message [bytes]."""


def read_fields(message: Any) -> Iterator[Field]:
    """Yield each field of a protobuf message."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        if (kind := key & 7) == 0:
            value, position = _varint(message, position)
        else:
            size, position = _varint(message, position) if kind == 2 else ({1: 8, 5: 4}[kind], position)
            value, position = message[position : position + size], position + size
        yield Field(key >> 3, value, position)


def make_control_pieces(model: bytes, is_control: Callable[[str], bool]) -> bytes:
    """Return a SentencePiece model in which pieces that users defined, and `is_control` names, are control pieces.

    SentencePiece finds a piece that users defined in any text, a control piece in none. A file that is no such model is
    returned as it is.
    """
    changed = bytearray(model)
    try:
        for field in read_fields(model):
            if field.number != _PIECES:
                continue
            piece = {inner.number: inner for inner in read_fields(field.value)}
            if _TYPE in piece and piece[_TYPE].value == _USER_DEFINED and is_control(piece[_TEXT].value.decode()):
                changed[field.end - len(field.value) + piece[_TYPE].end - 1] = _CONTROL
    except (KeyError, IndexError, TypeError, AttributeError, UnicodeDecodeError):
        return model
    return bytes(changed)


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
