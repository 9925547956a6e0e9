"""What guessing reaches: baselines that never look at a picture; and right answers by kind of question."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from quickstart.scenes import COLORS, SHAPES, Question

Item = dict[str, Any]


def most_frequent_answer(training: Sequence[Question], test: Sequence[Item]) -> float:
    """Return the accuracy of always giving the training split's most frequent answer."""
    guess = _mode(Counter(question.answer for question in training))
    return _share(test, lambda item: guess)


def most_frequent_answer_per_question(training: Sequence[Question], test: Sequence[Item]) -> float:
    """Return the accuracy of giving the most frequent training answer of the same question text."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in training:
        answers[question.text][question.answer] += 1
    overall = _mode(Counter(question.answer for question in training))
    return _share(test, lambda item: _mode(answers[item["question"]]) if item["question"] in answers else overall)


def kind_of_answer(answer: str) -> str:
    """Return what kind of question has this answer."""
    if answer in COLORS:
        return "color"
    return "shape" if answer in SHAPES else "yes or no"


def count_by_kind(rows: Sequence[Item]) -> dict[str, tuple[int, int]]:
    """Return right answers and questions by kind, from the rows that `evaluate` writes."""
    counts: dict[str, tuple[int, int]] = {kind: (0, 0) for kind in ("yes or no", "color", "shape")}
    for row in rows:
        kind = kind_of_answer(row["answers"][0])
        right, total = counts[kind]
        counts[kind] = (right + int(row["exact_match"]), total + 1)
    return counts


def _mode(counts: Counter[str]) -> str:
    # Ties go to the first in the alphabet, so that the figure does not depend on the order of the file.
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _share(test: Sequence[Item], guess: Any) -> float:
    return sum(guess(item) == item["answers"][0] for item in test) / len(test)
