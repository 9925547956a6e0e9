"""Which settings of a model differ from those that its weights were trained with, and which of them may.

Weights mean something only together with the settings of the model: most of them change what it computes without
changing the shape of a tensor. So a setting must be the same, unless its field says otherwise:

    init_method_std: Annotated[float, FREE] = 0.02

What a field says holds for subclasses that give it another default.
"""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any


class MayChange(Enum):
    """When a setting may differ from that of the weights."""

    NEVER = "never"
    NEW_STAGE = "new stage"
    """A new stage from the weights may have another value, and learns what it means; a run that goes on may not."""
    ALWAYS = "always"
    """It says nothing about the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """How the setting of an annotated field is compared; see `MayChange`."""

    may_change: MayChange = MayChange.NEVER
    stands_for: str | None = None
    """Property with the value that None stands for."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A setting with two values."""

    key: str
    first: Any
    second: Any
    may_change: MayChange


FREE = Compared(may_change=MayChange.ALWAYS)
IN_NEW_STAGE = Compared(may_change=MayChange.NEW_STAGE)
_UNMARKED = Compared()


def compare_settings(key: str, first: Any, second: Any, mark: Compared = _UNMARKED) -> Iterator[Difference]:
    """Yield the settings that differ, section by section.

    Sections of two types, or of which one is missing, differ as a whole: in their `type`.

    Args:
        key: of both.
        first: a section or a value.
        second: another one.
        mark: says whether the value, or the type of the section, may change.
    """
    if not (dataclasses.is_dataclass(first) or dataclasses.is_dataclass(second)):
        if first != second:
            yield Difference(key, first, second, mark.may_change)
        return
    if type(first) is not type(second):
        yield Difference(f"{key}.type", _type_of(first), _type_of(second), mark.may_change)
        return
    for field in dataclasses.fields(first):
        below = _mark_of(type(first), field.name)
        value, other = (getattr(one, below.stands_for or field.name) for one in (first, second))
        yield from compare_settings(f"{key}.{field.name}", value, other, below)


def _type_of(section: Any) -> Any:
    return getattr(section, "type", None)


def _mark_of(cls: type, field: str) -> Compared:
    for base in cls.__mro__:
        hint = typing.get_type_hints(base, include_extras=True).get(field)
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, Compared):
                return mark
    return _UNMARKED
