"""Visual question answering: short answers to questions about images, with or without worked examples."""

from collections.abc import Sequence
from pathlib import Path

from megatron_vlm.evaluation.prompts import Exchange
from megatron_vlm.evaluation.questions import Question, load_questions
from megatron_vlm.evaluation.scores import exact_match, vqa_accuracy
from megatron_vlm.evaluation.task import mean


def load(path: Path, images: Path | None) -> list[Question]:
    """Read a JSON list of questions; see `load_questions`."""
    return load_questions(path, images)


def prompt(question: Question, shots: Sequence[Question], suffix: str) -> list[Exchange]:
    """Return the worked examples, each with its most frequent answer, then the question."""
    worked = [Exchange(shot.text + suffix, len(shot.images), shot.usual_answer) for shot in shots]
    return [*worked, Exchange(question.text + suffix, len(question.images))]


def score(question: Question, prediction: str) -> dict[str, float]:
    """Return exact match and VQA accuracy of one answer."""
    return {
        "exact_match": exact_match.score(prediction, question.answers),
        "vqa_accuracy": vqa_accuracy.score(prediction, question.answers),
    }


def summarise(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the benchmark's accuracy, which is the mean VQA accuracy, and the fraction of exact matches."""
    return {"accuracy": mean(scores, "vqa_accuracy"), "exact_match": mean(scores, "exact_match")}
