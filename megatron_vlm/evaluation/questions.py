"""Questions about images: read from JSON, thinned out, shown with other images, chosen as worked examples."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vlm.config import DataError
from megatron_vlm.data.documents import PLACEHOLDER


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question and what people answered."""

    question_id: Any
    """As in the file; written beside the answer."""
    images: tuple[Path, ...]
    text: str
    answers: tuple[str, ...]

    @property
    def usual_answer(self) -> str:
        """The most frequent answer; the first of them in a tie."""
        return Counter(self.answers).most_common(1)[0][0]


def load_questions(path: Path, images: Path | None = None) -> list[Question]:
    """Read a JSON list of `{"question_id", "image", "question", "answers": [...] or "answer"}`.

    A question may contain "<image>" at the place of each image. Answers are texts or numbers.

    Args:
        path: the file.
        images: folder that image names are relative to; None: the folder of the file. `image` is a name or a list of
            names.

    Raises:
        DataError: the file or a row is wrong; names the first wrong row.
    """
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"questions cannot be read: {error.strerror}", where=str(path), fix="check the path") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"questions are not valid JSON: {error}", where=str(path), fix="write a JSON list") from None
    if not isinstance(rows, list) or not rows:
        raise DataError("questions are not a JSON list, or the list is empty", where=str(path), fix="write a JSON list")
    folder = path.parent if images is None else images
    return [_read_row(row, folder, f"{path} row {number}") for number, row in enumerate(rows)]


def _read_row(row: Any, folder: Path, where: str) -> Question:
    if not isinstance(row, dict):
        raise DataError("question is not a JSON object", where=where, fix="write one object per question")
    names = row.get("image")
    names = names if isinstance(names, list) else [names]
    answers = row.get("answers", row.get("answer"))
    answers = answers if isinstance(answers, list) else [answers]
    # In VQAv2, each answer is an object.
    answers = [_as_text(answer.get("answer") if isinstance(answer, dict) else answer) for answer in answers]
    for field, values in (("image", names), ("question", [row.get("question")]), ("answers", answers)):
        if not values or not all(isinstance(value, str) for value in values):
            raise DataError(f"{field} is missing or not text", where=where, fix=f"give {field} as text")
    if (count := row["question"].count(PLACEHOLDER)) not in (0, len(names)):
        raise DataError(
            f"question has {count} {PLACEHOLDER} for {len(names)} images",
            where=where,
            fix=f"write {PLACEHOLDER} once for each image, or not at all",
        )
    return Question(
        question_id=row.get("question_id"),
        images=tuple(folder / name for name in names),
        text=row["question"],
        answers=tuple(answers),
    )


def _as_text(answer: Any) -> Any:
    """Return a number as text, as counting benchmarks need it; anything else unchanged."""
    return str(answer) if isinstance(answer, int | float) and not isinstance(answer, bool) else answer


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Return `limit` questions spread evenly over all of them; all of them if limit is None or not smaller."""
    if limit is None or limit >= len(questions):
        return list(questions)
    return [questions[place * len(questions) // limit] for place in range(limit)]


def swap_pictures(questions: Sequence[Question], seed: int) -> list[Question]:
    """Show each question the image of another one: a model that uses its images must answer worse.

    The seed arranges the distinct images in a circle, and each is replaced by the next one. So no question keeps its
    image, each image is used once, and questions that shared an image still share one.

    Raises:
        DataError: there is only one image.
    """
    pictures = list(dict.fromkeys(question.images for question in questions))
    if len(pictures) < 2:
        raise DataError("there is only one image to swap", fix="evaluate questions about several images")
    random.Random(seed).shuffle(pictures)
    following = dict(zip(pictures, pictures[1:] + pictures[:1], strict=True))
    return [replace(question, images=following[question.images]) for question in questions]


def choose_shots(question: Question, pool: Sequence[Question], num_shots: int, seed: int) -> list[Question]:
    """Choose worked examples for a question at random: about other images, each about a different one.

    The choice depends only on the seed and the question, not on which other questions are asked.

    Raises:
        DataError: the pool has too few images.
    """
    draw = random.Random(f"{seed}/{question.question_id}/{question.text}")
    chosen: dict[tuple[Path, ...], Question] = {}
    # Drawing with repetition avoids a shuffled copy of a large pool; a pool that is nearly exhausted is scanned.
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
            f"{num_shots} worked examples are wanted, but only {len(chosen)} other images have questions",
            fix="lower --shots or give more examples",
        )
    return list(chosen.values())
