from quickstart.controls import (
    count_by_kind,
    most_frequent_answer,
    most_frequent_answer_per_question,
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


def test_answers_are_counted_by_kind() -> None:
    answers = [("yes", True), ("red", True), ("circle", False), ("no", False)]
    rows = [{"answers": [answer], "exact_match": match} for answer, match in answers]
    assert count_by_kind(rows) == {"yes or no": (1, 2), "color": (1, 1), "shape": (0, 1)}
