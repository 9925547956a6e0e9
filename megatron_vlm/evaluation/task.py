"""What a benchmark is: a module of `evaluation/tasks` with the functions of `Task`, found by its name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from megatron_vlm.config.modules import find_module
from megatron_vlm.evaluation.prompts import Exchange
from megatron_vlm.evaluation.questions import Question

TASKS = "megatron_vlm.evaluation.tasks"
"""Package whose modules are the tasks."""


class Task(Protocol):
    """The functions of one benchmark. The loop in `run.py` does the rest: batching, generation, files."""

    def load(self, path: Path, images: Path | None) -> Sequence[Question]:
        """Read the questions of a file.

        Args:
            path: the file.
            images: folder that image names are relative to; None: the folder of the file.

        Raises:
            DataError: the file cannot be read; names file and row.
        """

    def prompt(self, question: Question, shots: Sequence[Question], suffix: str) -> list[Exchange]:
        r"""Return the worked examples with their answers, then the question without one.

        Args:
            question: the question to ask.
            shots: questions chosen as worked examples; may be empty.
            suffix: text of the user's to put after every question, e.g. "\nAnswer with a single word."
        """

    def score(self, question: Question, prediction: str) -> dict[str, float]:
        """Return the scores of one answer by name; they are written beside it."""

    def summarise(self, scores: Sequence[dict[str, float]]) -> dict[str, float]:
        """Return the figures of the whole benchmark by name, from the scores of all answers (at least one)."""


def find_task(name: str) -> Task:
    """Return the task of this name.

    Raises:
        ConfigError: there is no such task.
    """
    module: Any = find_module(TASKS, name, "task")
    return cast("Task", module)


def mean(scores: Sequence[dict[str, float]], name: str) -> float:
    """Return the mean of one score over all answers."""
    return sum(row[name] for row in scores) / len(scores)
