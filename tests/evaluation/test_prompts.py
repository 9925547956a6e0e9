import pytest

from megatron_vlm.config import UsageError
from megatron_vlm.data.text.templates import DEFAULT_SYSTEM, TEMPLATES
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.evaluation.prompts import Exchange, PromptFormat
from tests.support.configs import tiny_model
from tests.support.sentence_piece import NUM_PIECES, train_sentence_piece

MODEL = tiny_model(vocab_size=NUM_PIECES)
IMAGE = [MODEL.language.image_token_id] * MODEL.constant_image_tokens


@pytest.fixture(scope="module")
def make_format(tmp_path_factory):
    tokenizer = load_tokenizer(train_sentence_piece(tmp_path_factory.mktemp("tokenizer")))

    def make(template="vicuna_v1", system=None) -> PromptFormat:
        chosen = TEMPLATES[template] if template else None
        return PromptFormat(tokenizer=tokenizer, model=MODEL, template=chosen, system=system)

    return make


def text_of(prompt_format: PromptFormat, ids) -> str:
    """Return the prompt with one <image> for each run of placeholders."""
    pieces, text = [], ""
    for token in ids.tolist():
        if token == MODEL.language.image_token_id:
            text += prompt_format.tokenizer.decode(pieces) + (
                "" if text.endswith("<image>") and not pieces else "<image>"
            )
            pieces = []
        else:
            pieces.append(token)
    return text + prompt_format.tokenizer.decode(pieces)


def test_pictures_stand_on_a_line_before_the_question(make_format):
    ids = make_format().encode([Exchange("What colour?", 1)])
    assert text_of(make_format(), ids) == " USER: <image>\nWhat colour? ASSISTANT:"
    assert ids[0] == 1
    assert (ids == MODEL.language.image_token_id).sum() == len(IMAGE)


def test_pictures_stand_where_the_text_has_them(make_format):
    ids = make_format().encode([Exchange("Is <image> like <image>?", 2)])
    assert text_of(make_format(), ids) == " USER: Is <image> like <image>? ASSISTANT:"


def test_worked_examples_are_earlier_turns(make_format):
    ids = make_format().encode([Exchange("One?", 1, "red"), Exchange("Two?", 1)])
    text = text_of(make_format(), ids)
    assert text == " USER: <image>\nOne? ASSISTANT: redUSER: <image>\nTwo? ASSISTANT:"
    assert (ids == 2).sum() == 1  # the end token after the example's answer


def test_the_system_prompt_of_the_template_is_used(make_format):
    ids = make_format(system=DEFAULT_SYSTEM).encode([Exchange("What?", 0)])
    assert text_of(make_format(), ids).startswith("A chat between a curious user")


def test_without_a_template_the_text_stands_alone(make_format):
    ids = make_format(None).encode([Exchange("<image> is a cat. <image> is", 2)])
    assert text_of(make_format(), ids) == "<image>is a cat. <image>is".replace("<image>is", "<image> is")


def test_placeholders_must_be_as_many_as_pictures(make_format):
    with pytest.raises(UsageError, match="2 placeholders for 1 images in '<image> and <image>'"):
        make_format().encode([Exchange("<image> and <image>", 1)])


def test_prompts_must_leave_room_for_an_answer(make_format, caplog):
    positions = MODEL.language.max_position_embeddings
    make_format().check_room([5, positions - 10], 10)
    assert not caplog.messages
    make_format().check_room([5, positions - 10], 11)
    (message,) = caplog.messages
    assert f"{positions} positions" in message
    assert "ends after 10 tokens, not 11" in message
    with pytest.raises(UsageError, match=f"1 of 2 prompts fill the {positions} positions .* has {positions} tokens"):
        make_format().check_room([5, positions], 1)
