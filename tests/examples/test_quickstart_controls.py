import json
from pathlib import Path

import pytest
from quickstart.controls import (
    count_by_kind,
    most_frequent_answer,
    most_frequent_answer_per_question,
    write_other_pictures,
)
from quickstart.scenes import Question


def learn(*rows: tuple[str, str]) -> list[Question]:
    return [Question(text=text, answer=answer, picture=number) for number, (text, answer) in enumerate(rows)]


def ask(*rows: tuple[str, str]) -> list[dict]:
    return [{"question": text, "answers": [answer], "image": f"{text}.png"} for text, answer in rows]


def test_most_frequent_answer_is_that_of_the_training_split() -> None:
    training = learn(("a", "yes"), ("b", "yes"), ("c", "no"))
    assert most_frequent_answer(training, ask(("a", "no"), ("b", "no"), ("c", "no"), ("d", "yes"))) == 0.25


def test_most_frequent_answer_per_question_follows_the_text() -> None:
    training = learn(("a", "no"), ("a", "no"), ("b", "yes"), ("b", "yes"), ("b", "yes"))
    assert most_frequent_answer_per_question(training, ask(("a", "no"), ("b", "yes"))) == 1.0


def test_unknown_question_gets_the_overall_answer() -> None:
    training = learn(("a", "no"), ("b", "yes"), ("b", "yes"))
    assert most_frequent_answer_per_question(training, ask(("new", "yes"))) == 1.0


@pytest.mark.parametrize("count", [2, 3, 7, 10])
def test_other_picture_is_never_the_own_one(tmp_path: Path, count: int) -> None:
    source, target = tmp_path / "test.json", tmp_path / "other.json"
    source.write_text(json.dumps(ask(*((str(number % count), "yes") for number in range(3 * count)))))
    assert write_other_pictures(source, target) == 3 * count
    before, after = (json.loads(path.read_text()) for path in (source, target))
    assert all(left["image"] != right["image"] for left, right in zip(before, after, strict=True))
    assert {item["image"] for item in after} == {item["image"] for item in before}


def test_answers_are_counted_by_kind() -> None:
    items = ask(("a", "yes"), ("b", "red"), ("c", "circle"), ("d", "no"))
    assert count_by_kind(items, ["yes", "red", "triangle", "yes"]) == {
        "yes or no": (1, 2),
        "color": (1, 1),
        "shape": (0, 1),
    }
