"""Questions about images: read from JSON, thinned out, shown with other images, chosen as worked examples."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vlm.config import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question and what people answered."""

    question_id: Any
    """As the file has it; written beside the answer."""
    images: tuple[Path, ...]
    text: str
    answers: tuple[str, ...]

    @property
    def usual_answer(self) -> str:
        """The most frequent answer; of equally frequent ones the first."""
        return Counter(self.answers).most_common(1)[0][0]


def load_questions(path: Path, images: Path | None = None) -> list[Question]:
    """Read a JSON list of `{"question_id", "image", "question", "answers": [...] or "answer"}`.

    Args:
        path: the file.
        images: folder that the names of the pictures are relative to; None: that of the file. `image` is a name or a
            list of names.

    Raises:
        DataError: names file and row of the first fault.
    """
    try:
        rows = json.loads(path.read_text())
    except OSError as error:
        raise DataError(f"questions cannot be read: {error.strerror}", where=str(path), fix="check the path") from None
    except ValueError as error:
        raise DataError(f"questions are not valid JSON: {error}", where=str(path), fix="write a JSON list") from None
    if not isinstance(rows, list) or not rows:
        raise DataError("questions are no JSON list, or an empty one", where=str(path), fix="write a JSON list")
    folder = path.parent if images is None else images
    return [_read_row(row, folder, f"{path} row {number}") for number, row in enumerate(rows)]


def _read_row(row: Any, folder: Path, where: str) -> Question:
    if not isinstance(row, dict):
        raise DataError("question is no JSON object", where=where, fix="write an object for each question")
    names = row.get("image")
    names = names if isinstance(names, list) else [names]
    answers = row.get("answers", row.get("answer"))
    answers = answers if isinstance(answers, list) else [answers]
    # VQAv2 writes each answer as an object.
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    for field, values in (("image", names), ("question", [row.get("question")]), ("answers", answers)):
        if not values or not all(isinstance(value, str) for value in values):
            raise DataError(f"question has no {field} that is text", where=where, fix=f"add the field {field}")
    return Question(
        question_id=row.get("question_id"),
        images=tuple(folder / name for name in names),
        text=row["question"],
        answers=tuple(answers),
    )


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Return `limit` questions spread evenly over all of them; all where there are no more, or limit is None."""
    if limit is None or limit >= len(questions):
        return list(questions)
    return [questions[place * len(questions) // limit] for place in range(limit)]


def swap_pictures(questions: Sequence[Question], seed: int) -> list[Question]:
    """Show each question another picture of the list: what a model that looks must lose by.

    The distinct pictures are put in a circle by the seed, and each is replaced by the next: none stays, each is used
    once, and questions about one picture are again about one.

    Raises:
        DataError: there is only one picture.
    """
    pictures = list(dict.fromkeys(question.images for question in questions))
    if len(pictures) < 2:
        raise DataError("there is only one picture to swap", fix="evaluate questions about several pictures")
    random.Random(seed).shuffle(pictures)
    following = dict(zip(pictures, pictures[1:] + pictures[:1], strict=True))
    return [replace(question, images=following[question.images]) for question in questions]


def choose_shots(question: Question, pool: Sequence[Question], num_shots: int, seed: int) -> list[Question]:
    """Choose worked examples for a question: by chance, about other pictures, each from a different picture.

    The choice depends on the seed and the question alone, not on which other questions are asked.

    Raises:
        DataError: the pool has too few pictures.
    """
    draw = random.Random(f"{seed}/{question.question_id}/{question.text}")
    chosen: dict[tuple[Path, ...], Question] = {}
    # Drawing with repetition needs no shuffled copy of a large pool; a pool that is nearly used up is gone through.
    for _ in range(20 * num_shots):
        if len(chosen) == num_shots:
            return list(chosen.values())
        candidate = pool[draw.randrange(len(pool))]
        if candidate.images != question.images:
            chosen.setdefault(candidate.images, candidate)
    for candidate in draw.sample(pool, len(pool)):
        if len(chosen) == num_shots:
            break
        if candidate.images != question.images:
            chosen.setdefault(candidate.images, candidate)
    if len(chosen) < num_shots:
        raise DataError(
            f"{num_shots} shots are asked for, the examples have {len(chosen)} other pictures",
            fix="lower --shots or give more examples",
        )
    return list(chosen.values())
