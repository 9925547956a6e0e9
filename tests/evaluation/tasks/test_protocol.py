"""Every file of evaluation/tasks is a task; a new one needs no other file to know it."""

import importlib
import inspect
import json
import sys

import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.config import ConfigError
from megatron_vlm.config.modules import module_names
from megatron_vlm.evaluation import tasks
from megatron_vlm.evaluation.questions import Question
from megatron_vlm.evaluation.task import TASKS, Task, find_task
from tests.support.configs import tiny_model
from tests.support.random_run import write_random_run
from tests.support.sentence_piece import NUM_PIECES, train_sentence_piece

TOY = """
from megatron_vlm.evaluation.prompts import Exchange
from megatron_vlm.evaluation import tasks
from megatron_vlm.evaluation.questions import Question

def load(path, images):
    return [Question(question_id=n, images=(), text=t, answers=("a",)) for n, t in enumerate(path.read_text().split())]

def prompt(question, shots, suffix):
    return [Exchange(question.text + suffix, 0)]

def score(question, prediction):
    return {"length": float(len(prediction))}

def summarise(scores):
    return {"longest_answer": max(row["length"] for row in scores)}
"""


@pytest.mark.parametrize("name", module_names(TASKS))
@pytest.mark.parametrize("function", ["load", "prompt", "score", "summarise"])
def test_every_file_offers_the_functions_of_a_task(name, function):
    offered = inspect.signature(getattr(importlib.import_module(f"{TASKS}.{name}"), function))
    wanted = inspect.signature(getattr(Task, function))
    assert list(offered.parameters) == list(wanted.parameters)[1:]


@pytest.mark.parametrize("name", module_names(TASKS))
def test_every_task_summarises_the_scores_it_gives(name):
    task = find_task(name)
    question = Question(question_id=0, images=(), text="?", answers=("red",))
    figures = task.summarise([task.score(question, "red"), task.score(question, "blue")])
    assert figures
    assert all(isinstance(value, float) for value in figures.values())


def test_unknown_task_lists_what_there_is():
    with pytest.raises(ConfigError, match=r"unknown task 'vqq'; fix: choose one of .*vqa"):
        find_task("vqq")


def test_a_task_is_added_without_editing_a_file(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "more_tasks"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, f"{TASKS}.toy", raising=False)
    write_random_run(tmp_path / "run", tiny_model(vocab_size=NUM_PIECES), train_sentence_piece(tmp_path))
    (tmp_path / "words.txt").write_text("what who where")
    arguments = ["--task", "toy", "--questions", str(tmp_path / "words.txt"), "--output", str(tmp_path / "out.json")]
    assert main(["evaluate", str(tmp_path / "run"), *arguments, "--max-new-tokens", "3"]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["task"], record["num_questions"]) == ("toy", 3)
    assert record["longest_answer"] == max(row["length"] for row in record["answers"])
    assert "toy: 3 questions, 0 shots: longest answer" in capsys.readouterr().out
