"""What the questions and answers of one picture imply about it."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.config import DataError

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One row of easy-vqa's questions.json."""

    text: str
    answer: str
    picture: int
    """Number of the picture in its split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """The single shape of a picture, as far as its questions tell; None or empty where they do not."""

    color: str | None
    shape: str | None
    absent: tuple[str, ...]
    """Colours and shapes that a question rules out, in alphabetical order."""


def read_questions(path: Path) -> list[Question]:
    """Read easy-vqa's `[text, answer, picture]` rows."""
    return [
        Question(text=text, answer=answer, picture=picture) for text, answer, picture in json.loads(path.read_text())
    ]


def describe_scene(questions: Iterable[Question]) -> Scene:
    """Conclude colour and shape of one picture from its questions and answers.

    A question that asks for one property names the other as given ("what color is the circle?"); a yes/no question
    states or excludes the one it names; a property is also known when all its other values are excluded.

    Raises:
        DataError: two questions contradict each other.
    """
    present: set[str] = set()
    absent: set[str] = set()
    for question in questions:
        words = _WORD.findall(question.text)
        named = {word for word in words if word in COLORS or word in SHAPES}
        if question.answer not in ("yes", "no"):
            present |= named | {question.answer}
            continue
        negated = "not" in words or "no" in words
        (present if (question.answer == "yes") != negated else absent).update(named)
    color, shape = (_conclude(values, present, absent) for values in (COLORS, SHAPES))
    return Scene(color=color, shape=shape, absent=tuple(sorted(absent)))


def _conclude(values: tuple[str, ...], present: set[str], absent: set[str]) -> str | None:
    known = present & set(values)
    left = [value for value in values if value not in absent]
    if len(known) > 1 or not left or known & absent:
        raise DataError(f"questions contradict each other: {sorted(present)} present, {sorted(absent)} absent")
    if known:
        return known.pop()
    return left[0] if len(left) == 1 else None
