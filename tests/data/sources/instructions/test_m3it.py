import pytest

from megatron_vlm.data.sources.instructions.m3it import split_dialog

HEAD = "Talk about it.Image Descriptions: a cat on a mat"


def test_visual_dialog_becomes_turns_with_its_descriptions_in_front():
    text = HEAD + "\nQuestion: big?\nAnswer: no\nQuestion: black?\nAnswer: yes, all\nQuestion: asleep?"
    assert split_dialog(text, "it is") == [(HEAD + "\nbig?", "no"), ("black?", "yes, all"), ("asleep?", "it is")]


@pytest.mark.parametrize("end", ["", "\nAnswer: "])
def test_visual_dialog_of_one_question(end):
    assert split_dialog(HEAD + "\nQuestion: big?" + end, "no") == [(HEAD + "\nbig?", "no")]


@pytest.mark.parametrize(
    "text",
    [
        "What is it?",
        HEAD,
        "Look.\nQuestion: big?\nAnswer: no\nQuestion: black?",
        HEAD + "\nQuestion: big?\nQuestion: black?",
        HEAD + "\nQuestion: big?\nAnswer: no\nAnswer: yes\nQuestion: black?",
        HEAD + "\nQuestion: big?\nAnswer: no",
    ],
)
def test_other_text_stays_one_question(text):
    assert split_dialog(text, "yes") == [(text, "yes")]
