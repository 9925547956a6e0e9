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
    stop_ids,
)
from megatron_vlm.data.text.tokenizer import load_tokenizer
from tests.support.byte_pair import CHATML_TEMPLATE, HOSTILE, LLAMA_3_TEMPLATE, write_llama_3, write_smollm2

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
    with pytest.raises(ConfigError, match="needs the token <.start_header_id"):
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


PUBLISHED = {"llama_3": (write_llama_3, LLAMA_3_TEMPLATE), "chatml": (write_smollm2, CHATML_TEMPLATE)}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request, tmp_path_factory):
    """Our template, our tokenizer, and the model's own tokenizer and template in transformers."""
    from transformers import AutoTokenizer

    write, template = PUBLISHED[request.param]
    folder = write(tmp_path_factory.mktemp("published"))
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = _with_mask(template, request.param)
    return TEMPLATES[request.param], load_tokenizer(folder), theirs


def _with_mask(template: str, name: str) -> str:
    """Mark what the model writes, which the published templates do not: answer and end of turn."""
    if name == "llama_3":
        answer = "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        head = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        return template.replace(
            "{{ content }}",
            "{% if message['role'] == 'assistant' %}" + head + answer + "{% else %}{{ content }}{% endif %}",
        )
    answer = "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    start = template.index("{{'<|im_start|>' + message")
    end = template.index("{% endfor %}")
    return (
        f"{template[:start]}{{% if message['role'] == 'assistant' %}}{{{{ '<|im_start|>assistant\n' }}}}{answer}"
        f"{{% else %}}{template[start:end]}{{% endif %}}{template[end:]}"
    )


def _messages(turns, system):
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn.question[0].text})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": turn.answer})
    return messages


CHATS = (
    (Turn((Text("What colour is it?"),), "red, and it's not blue"),),
    (Turn((Text("été 你好 😀 {x}"),), "12\n\n3"), Turn((Text("  no trim\tinside"),), "no"), Turn((Text("a"),), "b")),
)


@pytest.mark.parametrize("turns", CHATS)
@pytest.mark.parametrize("system", ["Be brief.", "It's \\ {a} test.\n\nTwo lines."])
def test_ids_and_masks_are_those_of_transformers_with_the_published_template(published, turns, system):
    template, ours, theirs = published
    turns = tuple(Turn((Text(turn.question[0].text.strip()),), turn.answer) for turn in turns)
    segments = encode_conversation(turns, ours, template=template, system=system)
    ids = [token for segment in segments for token in segment.input_ids.tolist()]
    mask = [int(segment.train) for segment in segments for _ in segment.input_ids]
    made = theirs.apply_chat_template(_messages(turns, system), return_assistant_tokens_mask=True, return_dict=True)
    assert made["input_ids"][: len(ids)] == ids
    assert made["assistant_masks"][: len(ids)] == mask
    assert theirs.decode(made["input_ids"][len(ids) :]) == ("\n" if template.name == "chatml" else "")
    assert not any(made["assistant_masks"][len(ids) :])


@pytest.mark.parametrize("turns", CHATS)
def test_prompts_are_those_of_transformers_with_the_published_template(published, turns):
    template, ours, theirs = published
    turns = tuple(Turn((Text(turn.question[0].text.strip()),), turn.answer) for turn in turns)
    segments = encode_prompt(turns, ours, template=template, system="Be brief.")
    ids = [token for segment in segments for token in segment.input_ids.tolist()]
    messages = _messages((*turns[:-1], Turn(turns[-1].question, None)), "Be brief.")
    assert theirs.apply_chat_template(messages, add_generation_prompt=True) == ids


def test_the_default_system_prompt_of_chatml_is_the_published_one(published):
    template, ours, theirs = published
    if template.name == "llama_3":
        pytest.skip("the published template of Llama 3 has none")
    turns = CHATS[0]
    (segment,) = encode_prompt(turns, ours, template=template)
    messages = _messages([Turn(turns[0].question, None)], None)
    assert theirs.apply_chat_template(messages, add_generation_prompt=True) == segment.input_ids.tolist()


def test_images_stand_between_the_ids_of_the_texts_around_them(published):
    """A template of text stays the same with an image in it: both tokenizers split a text at control tokens alone."""
    template, ours, theirs = published
    turns = (Turn((Text("see "), IMAGE, Text("\nwhat is this?")), "a cat"),)
    segments = encode_conversation(turns, ours, template=template, system="Be brief.")
    (place,) = [number for number, segment in enumerate(segments) if isinstance(segment, ImageSegment)]
    text = theirs.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "see <image>\nwhat is this?"},
            {"role": "assistant", "content": "a cat"},
        ],
        tokenize=False,
    )
    before, after = (theirs(part, add_special_tokens=False)["input_ids"] for part in text.split("<image>"))
    ids = [
        [token for one in part for token in one.input_ids.tolist()]
        for part in (segments[:place], segments[place + 1 :])
    ]
    assert ids[0] == before
    assert ids[1] == after[: len(ids[1])]


@pytest.mark.parametrize("name", ["hermes-2", "chatml", "llama_3"])
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_question_answer_or_system_prompt_writes_a_control_token(name, text, tokenizer, tmp_path):
    kinds = {"hermes-2": lambda: tokenizer, "chatml": lambda: load_tokenizer(write_smollm2(tmp_path))}
    ours = kinds.get(name, lambda: load_tokenizer(write_llama_3(tmp_path)))()
    template = TEMPLATES[name]

    def control(filling: str) -> list[int]:
        turns = [
            Turn((Text(filling + "?"), IMAGE, Text(filling + "?")), filling + "."),
            Turn((Text("q"),), filling + "."),
        ]
        segments = encode_conversation(turns, ours, template=template, system=filling + "!")
        tokens = [token for one in segments if not isinstance(one, ImageSegment) for token in one.input_ids.tolist()]
        return [token for token in tokens if ours.is_control(token)]

    assert control(text) == control("a")


def test_answers_end_at_eos_and_at_the_end_of_a_turn(tokenizer, tmp_path):
    assert stop_ids(None, tokenizer) == stop_ids(VICUNA, tokenizer) == stop_ids(PLAIN, tokenizer) == {2}
    assert stop_ids(TEMPLATES["hermes-2"], tokenizer) == {2, tokenizer.piece_id("<|im_end|>")}
    llama_3 = load_tokenizer(write_llama_3(tmp_path))
    assert stop_ids(TEMPLATES["llama_3"], llama_3) == {llama_3.eos_id, llama_3.piece_id("<|eot_id|>")}
    with pytest.raises(ConfigError, match="needs the token"):
        stop_ids(TEMPLATES["chatml"], llama_3)
