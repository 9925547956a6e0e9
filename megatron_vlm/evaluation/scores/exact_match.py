"""Exact match: the prediction is one of the known answers."""

from collections.abc import Sequence


def score(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the prediction equals one of the answers, ignoring case and surrounding blanks; else 0.0."""
    return float(prediction.strip().lower() in {answer.strip().lower() for answer in answers})
