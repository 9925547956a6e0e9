import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.data.documents import Image, Special, Text
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.samples import ImageSegment
from megatron_vlm.data.text.templates import (
    DEFAULT_SYSTEM,
    TEMPLATES,
    Turn,
    check_template,
    encode_conversation,
    encode_prompt,
    find_template,
    render_conversation,
    split_placeholders,
)

IMAGE = Image(b"picture")
TURNS = (Turn((IMAGE, Text("\nwhat is this?")), "a cat"), Turn((Text("what colour?"),), "red"))
VICUNA, LLAMA_2, PLAIN = TEMPLATES["vicuna_v1"], TEMPLATES["llama_2"], TEMPLATES["plain"]


def flat(segments) -> list:
    return [s.encoded if isinstance(s, ImageSegment) else (s.input_ids.tolist(), s.train) for s in segments]


def shown(document) -> list:
    """Segments as text with the mask; control tokens as their names."""
    result = []
    for segment in document.segments:
        if isinstance(segment, Image):
            result.append("IMAGE")
        elif isinstance(segment, Special):
            result.append((str(getattr(segment.token, "value", segment.token)), segment.train))
        else:
            result.append((segment.text, segment.train))
    return result


def test_vicuna_v1_text_and_mask():
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    assert shown(render_conversation(TURNS, VICUNA)) == [
        ("bos", False),
        (f"{system} USER: ", False),
        "IMAGE",
        ("\nwhat is this? ASSISTANT:", False),
        (" a cat", True),
        ("eos", True),
        ("USER: what colour? ASSISTANT:", False),
        (" red", True),
        ("eos", True),
    ]


def test_vicuna_v1_tokens(tokenizer):
    begin, go_on = tokenizer.encode, lambda text: tokenizer.encode(text, continuation=True)
    assert flat(encode_conversation(TURNS, tokenizer, template=VICUNA, system="be round")) == [
        ([1, *begin("be round USER: ")], False),
        b"picture",
        (begin("\nwhat is this? ASSISTANT:"), False),
        ([*go_on(" a cat"), 2], True),
        (go_on("USER: what colour? ASSISTANT:"), False),
        ([*go_on(" red"), 2], True),
    ]


def test_vicuna_v1_without_system_prompt_starts_with_one_blank():
    text = shown(render_conversation(TURNS[1:], VICUNA, None))[1]
    assert text == (" USER: what colour? ASSISTANT:", False)


def test_llama_2_text_and_mask():
    assert shown(render_conversation(TURNS, LLAMA_2, "be round")) == [
        ("bos", False),
        ("[INST] <<SYS>>\nbe round\n<</SYS>>\n\n", False),
        "IMAGE",
        ("\nwhat is this? [/INST]", False),
        (" a cat ", True),
        ("eos", True),
        ("bos", False),
        ("[INST] what colour? [/INST]", False),
        (" red ", True),
        ("eos", True),
    ]
    assert shown(render_conversation(TURNS[1:], LLAMA_2, None))[1] == ("[INST] what colour? [/INST]", False)


def test_plain_is_image_caption_line_break_without_eos():
    assert shown(render_conversation(TURNS[:1], PLAIN)) == [("bos", False), "IMAGE", ("a cat\n", True)]


def test_hermes_2_text_and_mask(tokenizer):
    assert shown(render_conversation(TURNS, TEMPLATES["hermes-2"])) == [
        ("bos", False),
        ("<|im_start|>", False),
        ("system\nAnswer the questions.", False),
        ("<|im_end|>", False),
        ("\n", False),
        ("<|im_start|>", False),
        ("user\n", False),
        "IMAGE",
        ("\nwhat is this?", False),
        ("<|im_end|>", False),
        ("\n", False),
        ("<|im_start|>", False),
        ("assistant\n", False),
        ("a cat", True),
        ("<|im_end|>", True),
        ("\n", False),
        ("<|im_start|>", False),
        ("user\nwhat colour?", False),
        ("<|im_end|>", False),
        ("\n", False),
        ("<|im_start|>", False),
        ("assistant\n", False),
        ("red", True),
        ("<|im_end|>", True),
    ]
    check_template(TEMPLATES["hermes-2"], tokenizer)


@pytest.mark.parametrize("name", ["vicuna_v1", "llama_2", "plain", "hermes-2"])
@pytest.mark.parametrize("count", [1, 2])
def test_prompt_is_the_beginning_of_the_training_sample(tokenizer, name, count):
    def stream(segments):
        tokens = []
        for segment in segments:
            tokens += [segment.encoded] if isinstance(segment, ImageSegment) else segment.input_ids.tolist()
        return tokens

    template = TEMPLATES[name]
    whole = stream(encode_conversation(TURNS[:count], tokenizer, template=template))
    prompt = stream(encode_prompt(TURNS[:count], tokenizer, template=template))
    assert whole[: len(prompt)] == prompt
    answer = template.answer.replace("{}", TURNS[count - 1].answer)
    assert tokenizer.decode([t for t in whole[len(prompt) :] if t > 2]).startswith(answer.strip())


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_only_answers_are_trained(name):
    document = render_conversation(TURNS, TEMPLATES[name])
    trained = " ".join(s.text for s in document.segments if isinstance(s, Text) and s.train)
    assert trained.split() == ["a", "cat", "red"]


def test_braces_in_prompts_and_answers_stay():
    turns = (Turn((Text("{x}"),), "{}{y}"),)
    assert (" {}{y}", True) in shown(render_conversation(turns, VICUNA, "{z}"))


def test_template_that_the_tokenizer_cannot_spell_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="needs the piece <.start_header_id"):
        check_template(TEMPLATES["llama_3"], tokenizer)


def test_unknown_template_names_the_choices():
    with pytest.raises(ConfigError, match="unknown conversation template 'v9'; fix: choose from .*vicuna_v1"):
        find_template("v9")


def test_placeholders_become_images_in_place():
    assert split_placeholders("a <image> b <image>", [Image(b"1"), Image(b"2")]) == (
        Text("a "),
        Image(b"1"),
        Text(" b "),
        Image(b"2"),
    )
    assert split_placeholders("no image", []) == (Text("no image"),)


@pytest.mark.parametrize(("text", "count"), [("<image>", 2), ("<image>" * 1_000_000, 1), ("none", 1)])
def test_other_numbers_of_placeholders_than_images_are_rejected(text, count):
    with pytest.raises(RejectError, match="placeholder_count"):
        split_placeholders(text, [Image(b"x")] * count)


def test_conversation_without_turns_or_answers_is_a_mistake_of_the_caller():
    for turns in ((), (Turn((Text("a"),), None), Turn((Text("b"),), "c"))):
        with pytest.raises(ValueError, match="needs turns"):
            render_conversation(turns, VICUNA)


def test_the_system_prompt_is_the_given_one_the_templates_or_none():
    template = find_template("vicuna_v1")
    assert template.choose_system(DEFAULT_SYSTEM) == template.system_text
    assert template.choose_system("Be brief.") == "Be brief."
    assert template.choose_system(None) is None
