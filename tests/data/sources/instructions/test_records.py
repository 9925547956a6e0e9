import base64
import json

import pytest

from megatron_vlm.config.prepare import ConversationRules, ImageRules
from megatron_vlm.data.documents import Control
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import FolderImages, ImageReader
from megatron_vlm.data.sources.instructions.conversations import ConversationSource
from megatron_vlm.data.sources.instructions.record_images import ImageRef
from megatron_vlm.data.sources.instructions.records import read_conversation
from megatron_vlm.data.sources.text import TextSource
from tests.support.documents import show


@pytest.fixture
def names(tmp_path, make_image):
    """Pictures of a folder by content, where ShareGPT4V has them and where LLaVA has them."""
    contents = {}
    for seed, name in enumerate(("sam/images/sa_545504.jpg", "coco/train2017/000000000009.jpg", "c.jpg")):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_image(seed=seed))
        contents[make_image(seed=seed)] = name
    return contents


@pytest.fixture
def reader(tmp_path, names):
    return ImageReader(FolderImages(tmp_path / "pictures", max_bytes=10**6), ImageRules())


@pytest.fixture
def read(tmp_path, make_lines, reader, names):
    """Read records without a system prompt: text, names of images and the marks of control tokens in one line."""

    def read_all(records, source=ConversationSource, **rules) -> list[str]:
        path = make_lines(tmp_path / "records.jsonl", records)
        found = source((path,), ConversationRules(system="none", **rules)).read(path, reader)
        return [_line(show(one, names)) for one in found]

    return read_all


def _line(parts) -> str:
    if isinstance(parts, str):
        return parts
    return "|".join({Control.BOS: "<s>", Control.EOS: "</s>"}.get(part, part) for part in parts)


# ------------------------------------------------------------------------------------------------ one question


@pytest.mark.parametrize(
    ("record", "question"),
    [
        ({"question": "q", "answer": "a"}, "q"),
        ({"question": "q", "response": "a"}, "q"),
        ({"prompt": "q", "response": "a"}, "q"),
        ({"prompt": "q", "completion": "a"}, "q"),
        ({"inputs": "q", "targets": "a"}, "q"),
        ({"instruction": "q", "output": "a"}, "q"),
        ({"instruction": "q", "input": "", "output": "a"}, "q"),
        ({"instruction": "q", "input": "more", "output": "a"}, "q\nmore"),
        ({"instruction": "q", "context": "more", "response": "a"}, "q\nmore"),
        ({"instruction": "q. ", "inputs": "more", "outputs": "a"}, "q. more"),
        ({"instruction": "q", "inputs": None, "outputs": "a"}, "q"),
        ({"question": "q", "answer": "a", "id": "text_flan_00000001", "image": []}, "q"),
        ({"question": "q", "answer": "a", "meta": {"prompt": 5}, "source": "x"}, "q"),
    ],
)
def test_every_form_of_question_and_answer_is_found_by_its_fields(read, record, question):
    expected = [f"<s>| USER: {question} ASSISTANT:| a|</s>"]
    assert read([record]) == expected
    assert read([record], TextSource) == expected


def test_system_prompt_of_a_record_is_used(read):
    record = {"system_prompt": "be brief", "question": "q", "response": "a"}
    assert read([record], TextSource) == ["<s>|be brief USER: q ASSISTANT:| a|</s>"]
    assert read([record | {"system_prompt": ""}], TextSource) == ["<s>| USER: q ASSISTANT:| a|</s>"]


def test_record_without_a_known_form_is_rejected_with_the_fields_it_has():
    with pytest.raises(RejectError, match="unknown_fields.* has the fields caption, id, url"):
        read_conversation({"url": "u", "id": 3, "caption": "c"})
    with pytest.raises(RejectError, match="unknown_fields.* has the fields nothing"):
        read_conversation({})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q"}, "json_type: field answer is missing"),
        ({"answer": "a"}, "json_type: field question is missing"),
        ({"instruction": "q"}, "json_type: field outputs is missing"),
        ({"question": ["q"], "answer": "a"}, "json_type: field question is list"),
        ({"question": "q", "answer": 5}, "json_type: field answer is int"),
        ({"instruction": "q", "inputs": 5, "outputs": "a"}, "json_type: field inputs is int"),
        ({"question": "q", "answer": " \n"}, "empty_text: answer is empty"),
    ],
)
def test_half_a_form_is_rejected_by_the_field(record, message):
    with pytest.raises(RejectError, match=message):
        read_conversation(record)


# -------------------------------------------------------------------------------------------------------- M3IT


def test_m3it_records_have_their_pictures_in_front_of_instruction_and_inputs(read, make_image):
    encoded = [base64.b64encode(make_image(seed=seed)).decode() for seed in (0, 2)]
    record = {"instruction": "Look closely. ", "inputs": "Which is red?", "outputs": "the first"}
    assert read([record | {"image_base64_str": encoded}, record | {"image_base64_str": encoded[:1]}, record]) == [
        "<s>| USER: |sam/images/sa_545504.jpg|\n|c.jpg|\nLook closely. Which is red? ASSISTANT:| the first|</s>",
        "<s>| USER: |sam/images/sa_545504.jpg|\nLook closely. Which is red? ASSISTANT:| the first|</s>",
        "<s>| USER: Look closely. Which is red? ASSISTANT:| the first|</s>",
    ]


def test_m3it_in_parquet_gives_the_same_documents(tmp_path, make_lines, make_table, reader, make_image):
    encoded = base64.b64encode(make_image(seed=1)).decode()
    rows = [
        {"instruction": f"Do {n}. ", "inputs": "x", "image_base64_str": [encoded] * n, "outputs": f"y{n}"}
        for n in range(3)
    ]
    table = make_table(tmp_path / "train.parquet", {name: [row[name] for row in rows] for name in rows[0]})
    lines = make_lines(tmp_path / "train.jsonl", rows)
    array = tmp_path / "train.json"
    array.write_text(json.dumps(rows))
    found = [[one.document for one in ConversationSource((p,)).read(p, reader)] for p in (table, lines, array)]
    assert found[0] == found[1] == found[2]
    assert [len(document.images) for document in found[0]] == [0, 1, 2]


def test_m3it_visual_dialog_trains_every_answer(read, make_image):
    encoded = base64.b64encode(make_image(seed=2)).decode()
    text = "Image Descriptions: a cat\nQuestion: big?\nAnswer: no\nQuestion: red?"
    record = {"instruction": "Talk. ", "inputs": text, "outputs": "yes", "image_base64_str": [encoded]}
    assert read([record]) == [
        "<s>| USER: |c.jpg|\nTalk. Image Descriptions: a cat\nbig? ASSISTANT:| no|</s>|USER: red? ASSISTANT:| yes|</s>"
    ]


def test_m3it_damaged_picture_is_rejected_by_reason(read, make_image):
    cut = base64.b64encode(make_image(seed=2)[:200]).decode()
    record = {"instruction": "a", "inputs": "b", "outputs": "c"}
    reasons = read([record | {"image_base64_str": [value]} for value in ("***", "aGVsbG8=", cut)])
    assert reasons[:2] == ["image_base64", "image_format"]
    assert reasons[2].startswith("image_")


# -------------------------------------------------------------------------------------------------- ShareGPT4V

SHARE_GPT_4V = {
    "id": "sa_545504",
    "image": "sam/images/sa_545504.jpg",
    "conversations": [
        {"from": "human", "value": "What do you see happening in this image?\n<image>"},
        {"from": "gpt", "value": "The image captures a scene at an airport, with a plane on the tarmac."},
    ],
}


def test_sharegpt4v_goes_through_with_its_own_paths(read):
    record = SHARE_GPT_4V | {"id": "000000000009", "image": "coco/train2017/000000000009.jpg"}
    text = "The image captures a scene at an airport, with a plane on the tarmac."
    assert read([SHARE_GPT_4V, record]) == [
        "<s>| USER: What do you see happening in this image?\n|sam/images/sa_545504.jpg| ASSISTANT:| " + text + "|</s>",
        "<s>| USER: What do you see happening in this image?\n|coco/train2017/000000000009.jpg| ASSISTANT:| "
        + text
        + "|</s>",
    ]


def test_sharegpt4v_without_the_pictures_of_sam_rejects_just_those(tmp_path, make_lines, reader):
    gone = SHARE_GPT_4V | {"id": "sa_1", "image": "sam/images/sa_1.jpg"}
    path = make_lines(tmp_path / "a.jsonl", [SHARE_GPT_4V, gone, SHARE_GPT_4V])
    found = list(ConversationSource((path,)).read(path, reader))
    reasons = [one.document.reason if isinstance(one.document, RejectError) else None for one in found]
    assert reasons == [None, "image_missing", None]
    assert (found[1].line, found[1].key) == (2, "sa_1")
    assert "sam/images/sa_1.jpg" in found[1].document.detail


# -------------------------------------------------------------------------------------------- places of images


def llava(*texts, **more):
    return {"conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)], **more}


def test_images_stand_in_the_middle_of_text_and_in_some_turns_only(read):
    record = llava(
        "first", "1", "a <image> b <image>", "2", "third", "3", "<image> last", "4",
        image=["c.jpg", "coco/train2017/000000000009.jpg", "c.jpg"],
    )  # fmt: skip
    assert read([record]) == [
        "<s>| USER: first ASSISTANT:| 1|</s>|USER: a |c.jpg| b |coco/train2017/000000000009.jpg| ASSISTANT:| 2|</s>|"
        "USER: third ASSISTANT:| 3|</s>|USER: |c.jpg| last ASSISTANT:| 4|</s>"
    ]


def test_placeholder_in_an_answer_is_text(read):
    assert read([llava("<image>", "it shows an <image> tag", image="c.jpg")]) == [
        "<s>| USER: |c.jpg| ASSISTANT:| it shows an <IMAGE> tag|</s>"
    ]


def test_placeholders_without_a_picture_are_rejected(read):
    records = [llava("<image> <image>", "a", image="c.jpg"), llava("<image>", "a", image=["c.jpg", "c.jpg"])]
    assert read(records) == ["placeholder_count"] * 2


# ---------------------------------------------------------------------------------------------------- messages


def messages(*contents, **more):
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)], **more}


def test_messages_of_text_are_turns(read):
    record = messages("q", "a", "r", "b")
    record["messages"].insert(0, {"role": "system", "content": "be brief"})
    expected = ["<s>|be brief USER: q ASSISTANT:| a|</s>|USER: r ASSISTANT:| b|</s>"]
    assert read([record]) == expected
    assert read([record], TextSource) == expected


def test_placeholders_in_messages_take_the_images_of_the_record(read):
    record = messages("<image>\nwhat?", "a", images=["c.jpg"])
    assert read([record]) == ["<s>| USER: |c.jpg|\nwhat? ASSISTANT:| a|</s>"]


def test_parts_of_a_message_are_lines_and_images_stand_among_them(read, make_image):
    uri = "data:image/jpeg;base64," + base64.b64encode(make_image(seed=0)).decode()
    content = [
        {"type": "text", "text": "left <image> of"},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image", "image": "c.jpg"},
        {"type": "text", "text": "?"},
    ]
    assert read([messages(content, [{"type": "text", "text": "yes"}])]) == [
        "<s>| USER: left <IMAGE> of\n|sam/images/sa_545504.jpg|\n|c.jpg|\n? ASSISTANT:| yes|</s>"
    ]


def test_parts_without_a_name_take_the_images_of_the_record_in_order():
    content = [{"type": "image"}, {"type": "image_url", "image_url": "b"}, {"type": "image"}]
    found = read_conversation(messages(content, "a", images=["x", "y"]))
    assert found.images == [ImageRef("x"), ImageRef("b"), ImageRef("y")]
    assert found.exchanges == [("<image>\n<image>\n<image>", "a")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (messages([{"type": "image"}], "a"), "placeholder_count"),
        (messages([{"type": "image"}], "a", images=["c.jpg", "c.jpg"]), "placeholder_count"),
        (messages([{"type": "video", "video": "x"}], "a"), "content_type"),
        (messages(["q"], "a"), "json_type"),
        (messages([{"text": "q"}], "a"), "json_type"),
        (messages(5, "a"), "json_type"),
        (messages([{"type": "image", "image": 5}], "a"), "json_type"),
        (messages("q", [{"type": "image", "image": "c.jpg"}]), "turn_order"),
        (messages("q"), "turn_order"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "turn_order"),
        ({"messages": "q"}, "json_type"),
        ({"messages": ["q"]}, "json_type"),
    ],
)
def test_bad_messages_are_rejected(read, record, reason):
    assert read([record]) == [reason]


# -------------------------------------------------------------------------------------------------------- text


def test_record_with_images_is_no_text(read):
    assert read([{"question": "q", "answer": "a", "image": "c.jpg"}], TextSource) == ["images_in_text"]


def test_long_conversation_of_short_texts_is_rejected(tmp_path, make_lines, reader):
    from megatron_vlm.config.prepare import TextRules

    path = make_lines(tmp_path / "a.jsonl", [messages("q" * 30, "a" * 30, "q" * 30, "a" * 30)])
    rules = ConversationRules(text=TextRules(max_characters=100))
    for source in (TextSource, ConversationSource):
        (found,) = source((path,), rules).read(path, reader)
        assert found.document.reason == "text_too_long"


def test_too_long_record_is_rejected_by_every_reader(tmp_path, make_lines, make_table, reader):
    record = {"question": "q" * 300, "answer": "a"}
    paths = [
        make_lines(tmp_path / "a.jsonl", [record]),
        make_table(tmp_path / "a.parquet", {k: [v] for k, v in record.items()}),
    ]
    for source in (TextSource, ConversationSource):
        for path in paths:
            (found,) = source((path,), ConversationRules(max_record_bytes=200)).read(path, reader)
            assert found.document.reason == "record_too_long"
