"""Ask the questions of a task, answer them with a model, and score the answers; knows no particular task."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_vlm.config.inference import EvaluationOptions, SamplingOptions
from megatron_vlm.evaluation.answer import Prompt
from megatron_vlm.evaluation.opened_model import OpenedModel
from megatron_vlm.evaluation.pictures import check_pictures
from megatron_vlm.evaluation.questions import Question, choose_shots
from megatron_vlm.evaluation.task import Task, find_task

FEATURE_BYTES = 2**30
"""Most image features held at a time [bytes]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The result of one task."""

    summary: dict[str, Any]
    """What was asked, and the figures."""
    figures: dict[str, float]
    """The scores of the whole benchmark by name; also in `summary`."""
    answers: list[dict[str, Any]]
    """One for each question, in the order of the questions."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with its worked examples."""

    number: int
    """Its place among the questions."""
    question: Question
    shots: tuple[Question, ...]

    @property
    def pictures(self) -> tuple[Path, ...]:
        """The images of the worked examples, then those of the question."""
        return tuple(path for one in (*self.shots, self.question) for path in one.images)


def choose_asked(
    questions: Sequence[Question], options: EvaluationOptions, pool: Sequence[Question] = ()
) -> list[Asked]:
    """Choose the worked examples of each question, and check all images before a model is loaded.

    Args:
        questions: what to ask, at least one.
        options: how to ask.
        pool: questions to choose worked examples from; needed where `options.num_shots` is not 0.

    Raises:
        DataError: an image is missing or damaged, or the pool is too small.
    """
    asked = [
        Asked(number, question, tuple(_shots(question, pool, options))) for number, question in enumerate(questions)
    ]
    check_pictures([path for one in asked for path in one.pictures])
    return asked


def evaluate(task_name: str, asked: Sequence[Asked], model: OpenedModel, *, options: EvaluationOptions) -> Evaluation:
    """Ask the questions, answer them greedily and score the answers.

    Args:
        task_name: module of `evaluation/tasks`.
        asked: what to ask, from `choose_asked`.
        model: the model that answers.
        options: how to ask.

    Raises:
        ConfigError: there is no such task.
        DataError: the pixels of an image are damaged.
        UsageError: a prompt is too long for the model.
    """
    start = time.perf_counter()
    task = find_task(task_name)
    questions = [one.question for one in asked]
    predictions = [""] * len(asked)
    with tqdm(total=len(asked), unit="question", desc=task_name, disable=None) as progress:
        for number, text in _answers(task, asked, model, options):
            predictions[number] = text
            progress.update()
    scores = [task.score(question, prediction) for question, prediction in zip(questions, predictions, strict=True)]
    figures = task.summarise(scores)
    summary = {
        "task": task_name,
        "num_questions": len(questions),
        "num_shots": options.num_shots,
        **figures,
        "seconds": round(time.perf_counter() - start, 2),
    }
    rows = [_row(*one) for one in zip(questions, predictions, scores, strict=True)]
    return Evaluation(summary=summary, figures=figures, answers=rows)


def _shots(question: Question, pool: Sequence[Question], options: EvaluationOptions) -> list[Question]:
    return choose_shots(question, pool, options.num_shots, options.shot_seed) if options.num_shots else []


def _windows(asked: Sequence[Asked], feature_bytes: int) -> Iterator[list[Asked]]:
    """Yield questions grouped by picture, as many at a time as their features fit in FEATURE_BYTES."""
    limit = max(1, FEATURE_BYTES // feature_bytes)
    window: list[Asked] = []
    pictures: set[Path] = set()
    order = {images: place for place, images in enumerate(dict.fromkeys(one.question.images for one in asked))}
    for one in sorted(asked, key=lambda one: order[one.question.images]):
        if window and len(pictures.union(one.pictures)) > limit:
            yield window
            window, pictures = [], set()
        window.append(one)
        pictures.update(one.pictures)
    yield window


def _answers(
    task: Task, asked: Sequence[Asked], model: OpenedModel, options: EvaluationOptions
) -> Iterator[tuple[int, str]]:
    """Yield the number of each question and the text of its answer, in any order."""
    sampling = SamplingOptions(max_new_tokens=options.max_new_tokens)

    def encode(one: Asked) -> np.ndarray:
        return model.prompt_format.encode(task.prompt(one.question, one.shots, options.suffix))

    # Before anything is answered; the ids of all questions would take much memory, so only their number is kept.
    model.prompt_format.check_room([len(encode(one)) for one in asked], options.max_new_tokens)
    for window in _windows(asked, model.generator.feature_bytes):
        paths = dict.fromkeys(path for one in window for path in one.pictures)
        places = {path: place for place, path in enumerate(paths)}
        features = model.generator.encode_images(model.reader.read(list(places)))
        prompts = [Prompt(encode(one), tuple(places[path] for path in one.pictures)) for one in window]
        for answer in model.generator.generate(prompts, features, sampling):
            yield window[answer.number].number, model.prompt_format.tokenizer.decode(answer.ids).strip()


def _row(question: Question, prediction: str, scores: dict[str, float]) -> dict[str, Any]:
    return {
        "question_id": question.question_id,
        "images": [str(path) for path in question.images],
        "question": question.text,
        "answers": list(question.answers),
        "prediction": prediction,
        **scores,
    }
