"""The task vqa: short answers to questions about pictures, with or without worked examples."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_vlm.evaluation.answer import Generator, Prompt
from megatron_vlm.evaluation.pictures import PictureReader, check_pictures
from megatron_vlm.evaluation.prompts import Exchange, PromptFormat
from megatron_vlm.evaluation.sampling import SamplingOptions
from megatron_vlm.evaluation.scores.short_answers import exact_match, vqa_accuracy
from megatron_vlm.evaluation.tasks.questions import Question, choose_shots

FEATURE_BYTES = 2**30
"""Largest set of image features that is kept at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VQAOptions:
    """How questions are asked."""

    suffix: str = ""
    """Put after every question, e.g. "\\nAnswer the question using a single word or phrase."."""
    num_shots: int = 0
    """Worked examples before each question."""
    shot_seed: int = 0
    """Decides which examples."""
    max_new_tokens: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class VQAResult:
    """What was measured."""

    summary: dict[str, Any]
    answers: list[dict[str, Any]]
    """One for each question, in the order of the questions."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question with its worked examples."""

    number: int
    question: Question
    shots: tuple[Question, ...]

    @property
    def pictures(self) -> tuple[Path, ...]:
        return tuple(path for one in (*self.shots, self.question) for path in one.images)


def run_vqa(
    questions: Sequence[Question],
    generator: Generator,
    prompt_format: PromptFormat,
    reader: PictureReader,
    *,
    options: VQAOptions,
    pool: Sequence[Question] = (),
) -> VQAResult:
    """Ask, answer greedily and score.

    Args:
        questions: what is asked.
        generator: the model.
        prompt_format: how prompts are written.
        reader: reads the pictures.
        options: how it is asked.
        pool: where worked examples come from; needed where `options.num_shots` is not 0.

    Raises:
        DataError: a picture is missing or damaged, or the pool is too small.
    """
    start = time.perf_counter()
    asked = [
        _Asked(number, question, tuple(_shots(question, pool, options))) for number, question in enumerate(questions)
    ]
    check_pictures([path for one in asked for path in one.pictures])
    predictions = [""] * len(asked)
    with tqdm(total=len(asked), unit="question", desc="vqa", disable=None) as progress:
        for window in _windows(asked, generator.feature_bytes):
            for number, text in _answer(window, generator, prompt_format, reader, options):
                predictions[number] = text
                progress.update()
    rows = [_score(question, prediction) for question, prediction in zip(questions, predictions, strict=True)]
    return VQAResult(summary=_summarise(rows, options, time.perf_counter() - start), answers=rows)


def _shots(question: Question, pool: Sequence[Question], options: VQAOptions) -> list[Question]:
    return choose_shots(question, pool, options.num_shots, options.shot_seed) if options.num_shots else []


def _windows(asked: Sequence[_Asked], feature_bytes: int) -> Iterator[list[_Asked]]:
    """Yield questions, those about one picture together, with as many pictures as features are kept."""
    limit = max(1, FEATURE_BYTES // feature_bytes)
    window: list[_Asked] = []
    pictures: set[Path] = set()
    order = {images: place for place, images in enumerate(dict.fromkeys(one.question.images for one in asked))}
    for one in sorted(asked, key=lambda one: order[one.question.images]):
        if window and len(pictures.union(one.pictures)) > limit:
            yield window
            window, pictures = [], set()
        window.append(one)
        pictures.update(one.pictures)
    yield window


def _answer(
    window: Sequence[_Asked],
    generator: Generator,
    prompt_format: PromptFormat,
    reader: PictureReader,
    options: VQAOptions,
) -> Iterator[tuple[int, str]]:
    """Yield the number of each question and the text of its answer."""
    places = {path: place for place, path in enumerate(dict.fromkeys(path for one in window for path in one.pictures))}
    features = generator.encode_images(reader.read(list(places)))
    prompts = [
        Prompt(prompt_format.encode(_exchanges(one, options)), tuple(places[path] for path in one.pictures))
        for one in window
    ]
    for answer in generator.generate(prompts, features, SamplingOptions(max_new_tokens=options.max_new_tokens)):
        yield window[answer.number].number, prompt_format.tokenizer.decode(answer.ids).strip()


def _exchanges(one: _Asked, options: VQAOptions) -> list[Exchange]:
    shots = [Exchange(shot.text + options.suffix, len(shot.images), shot.usual_answer) for shot in one.shots]
    return [*shots, Exchange(one.question.text + options.suffix, len(one.question.images))]


def _score(question: Question, prediction: str) -> dict[str, Any]:
    return {
        "question_id": question.question_id,
        "images": [str(path) for path in question.images],
        "question": question.text,
        "answers": list(question.answers),
        "prediction": prediction,
        "exact_match": exact_match(prediction, question.answers),
        "vqa_accuracy": vqa_accuracy(prediction, question.answers),
    }


def _summarise(rows: Sequence[dict[str, Any]], options: VQAOptions, seconds: float) -> dict[str, Any]:
    def mean(name: str) -> float:
        return sum(row[name] for row in rows) / len(rows)

    return {
        "task": "vqa",
        "num_questions": len(rows),
        "num_shots": options.num_shots,
        "accuracy": mean("vqa_accuracy"),
        "exact_match": mean("exact_match"),
        "seconds": round(seconds, 2),
    }
