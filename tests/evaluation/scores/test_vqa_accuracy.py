import pytest

from megatron_vlm.evaluation.scores.vqa_accuracy import normalise_answer, score


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("A Cat.", "cat"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("the man's hat", "man 's hat"),
        ("10,000", "10000"),
        ("black/white", "black white"),
        ("black / white", "black  white".replace("  ", " ")),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("yes\nno", "yes no"),
        ("t-shirt", "t shirt"),
        ("left - right", "left right"),
    ],
)
def test_normalise_answer(answer, normalised):
    assert normalise_answer(answer) == normalised


def test_normalise_answer_removes_32_periods_as_the_reference_does():
    assert normalise_answer("x" + "." * 40) == "x" + "." * 8


@pytest.mark.parametrize(("num_same", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_answers_is_the_official_one(num_same, accuracy):
    answers = ["red"] * num_same + [f"colour {i}" for i in range(10 - num_same)]
    assert score("Red.", answers) == pytest.approx(accuracy)


def test_vqa_accuracy_of_one_answer_is_equality_after_normalisation():
    assert score("Two", ["2"]) == 1.0
    assert score("three", ["2"]) == 0.0


def test_vqa_accuracy_of_few_answers_reaches_one_where_all_agree():
    assert score("red", ["red", "red"]) == 1.0
    assert score("red", ["red", "blue"]) == 0.5
