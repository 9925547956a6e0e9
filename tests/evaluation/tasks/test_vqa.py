from pathlib import Path

from megatron_vlm.evaluation.prompts import Exchange
from megatron_vlm.evaluation.questions import Question
from megatron_vlm.evaluation.tasks import vqa

QUESTION = Question(question_id=1, images=(Path("a.png"),), text="what?", answers=("red",))
SHOT = Question(question_id=2, images=(Path("b.png"), Path("c.png")), text="who?", answers=("a", "b", "b"))


def test_worked_examples_have_their_usual_answer_and_the_question_has_none():
    assert vqa.prompt(QUESTION, [SHOT], " Say it.") == [
        Exchange("who? Say it.", 2, "b"),
        Exchange("what? Say it.", 1, None),
    ]


def test_accuracy_is_the_mean_of_vqa_accuracy():
    scores = [vqa.score(QUESTION, said) for said in ("Red.", "red", "blue", "green")]
    assert vqa.summarise(scores) == {"accuracy": 0.5, "exact_match": 0.25}
