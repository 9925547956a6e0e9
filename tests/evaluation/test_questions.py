import json
from pathlib import Path

import pytest

from megatron_vlm.config import DataError
from megatron_vlm.evaluation.questions import Question, choose_shots, load_questions, spread, swap_pictures

ROW = {"question_id": 7, "image": "a.png", "question": "What?", "answers": ["red", "blue", "blue"]}


def make_questions(num_pictures: int, per_picture: int = 3) -> list[Question]:
    return [
        Question(question_id=(picture, turn), images=(Path(f"{picture}.png"),), text=f"what {turn}?", answers=("x",))
        for picture in range(num_pictures)
        for turn in range(per_picture)
    ]


@pytest.fixture
def write(tmp_path):
    def to_file(value) -> Path:
        path = tmp_path / "questions.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return to_file


def test_pictures_are_beside_the_file_by_default(write):
    path = write([ROW])
    assert load_questions(path)[0].images == (path.parent / "a.png",)


def test_pictures_are_in_the_given_folder(write):
    assert load_questions(write([ROW]), Path("/pictures"))[0].images == (Path("/pictures/a.png"),)


def test_a_question_may_have_several_pictures(write):
    question = load_questions(write([{**ROW, "image": ["a.png", "b.png"]}]), Path("p"))[0]
    assert question.images == (Path("p/a.png"), Path("p/b.png"))


def test_one_answer_may_stand_alone(write):
    row = {name: value for name, value in ROW.items() if name != "answers"}
    assert load_questions(write([{**row, "answer": "red"}]))[0].answers == ("red",)


def test_answers_of_vqav2_are_objects(write):
    assert load_questions(write([{**ROW, "answers": [{"answer": "red", "answer_id": 1}]}]))[0].answers == ("red",)


def test_a_number_is_an_answer(write):
    assert load_questions(write([{**ROW, "answers": [3, 2.5]}]))[0].answers == ("3", "2.5")


def test_a_byte_order_mark_is_no_part_of_the_questions(tmp_path):
    (tmp_path / "q.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([ROW]).encode())
    assert load_questions(tmp_path / "q.json")[0].question_id == 7


def test_the_usual_answer_is_the_most_frequent(write):
    assert load_questions(write([ROW]))[0].usual_answer == "blue"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "questions are not valid JSON"),
        ("[" * 100_000, "questions are not valid JSON"),
        ([], "questions are not a JSON list, or the list is empty"),
        ({"a": 1}, "questions are not a JSON list"),
        ([ROW, 3], "question is not a JSON object .*row 1"),
        ([{**ROW, "image": 3}], "image is missing or not text .*row 0"),
        ([ROW, {**ROW, "question": "<image> or <image>?"}], "question has 2 <image> for 1 images .*row 1"),
        ([{**ROW, "answers": [True]}], "answers is missing or not text"),
        ([{**ROW, "question": None}], "question is missing or not text"),
        ([{**ROW, "answers": []}], "answers is missing or not text"),
        ([{"image": "a", "question": "b"}], "answers is missing or not text"),
    ],
)
def test_a_fault_names_file_and_row(content, message, write):
    with pytest.raises(DataError, match=message):
        load_questions(write(content))


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(DataError, match="questions cannot be read: No such file"):
        load_questions(tmp_path / "none.json")


@pytest.mark.parametrize("num_pictures", [2, 3, 50])
def test_swapped_pictures_are_never_ones_own_and_each_is_used_once(num_pictures):
    questions = make_questions(num_pictures)
    swapped = swap_pictures(questions, seed=4)
    shown = {before.images: after.images for before, after in zip(questions, swapped, strict=True)}
    assert all(own != other for own, other in shown.items())
    assert len(set(shown.values())) == num_pictures
    assert all(shown[b.images] == a.images for b, a in zip(questions, swapped, strict=True))


def test_swapped_pictures_depend_on_the_seed_alone():
    questions = make_questions(20)
    assert swap_pictures(questions, 1) == swap_pictures(questions, 1)
    assert swap_pictures(questions, 1) != swap_pictures(questions, 2)


def test_one_picture_cannot_be_swapped():
    with pytest.raises(DataError, match="only one image to swap"):
        swap_pictures(make_questions(1), 0)


def test_shots_are_about_other_pictures_each_from_a_different_one():
    pool = make_questions(6)
    for question in pool:
        shots = choose_shots(question, pool, 4, seed=0)
        pictures = [shot.images for shot in shots]
        assert len(set(pictures)) == 4
        assert question.images not in pictures


def test_shots_depend_on_seed_and_question_alone():
    pool = make_questions(30)
    assert choose_shots(pool[3], pool, 4, seed=0) == choose_shots(pool[3], pool, 4, seed=0)
    assert choose_shots(pool[3], pool, 4, seed=0) != choose_shots(pool[3], pool, 4, seed=1)
    assert choose_shots(pool[3], pool, 4, seed=0) != choose_shots(pool[4], pool, 4, seed=0)


def test_a_pool_that_is_just_large_enough_is_used_up():
    pool = make_questions(2, per_picture=1) + make_questions(1, per_picture=400)
    assert len(choose_shots(make_questions(5)[-1], pool, 2, seed=0)) == 2


def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(DataError, match="4 worked examples are wanted, but only 2 other images have questions"):
        choose_shots(make_questions(3)[0], make_questions(3), 4, seed=0)


@pytest.mark.parametrize(
    ("limit", "places"), [(None, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4]), (5, [0, 1, 2, 3, 4]), (2, [0, 2])]
)
def test_a_limit_spreads_over_all_questions(limit, places):
    questions = make_questions(5, per_picture=1)
    assert spread(questions, limit) == [questions[place] for place in places]
