import base64
import dataclasses
import functools
import json
import random

import pytest

from megatron_vlm.config import load_section
from megatron_vlm.config.prepare import ConversationRules, ImageRules
from megatron_vlm.data.documents import Text
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import FolderImages, ImageReader
from megatron_vlm.data.sources.instructions import prompt_pools
from megatron_vlm.data.sources.instructions.prompt_pools import PromptSet
from megatron_vlm.data.sources.instructions.prompted import PromptedSource, PromptRules, choose, find_value

load_prompt_set = functools.lru_cache(prompt_pools.load_prompt_set)
VICUNA = ConversationRules(system="none")


@pytest.fixture
def reader(tmp_path, make_image):
    """A folder in which every picture that the records of this file name is there."""
    root = tmp_path / "pictures"
    names = ["a.jpg", "b.jpg", "7.jpg", "train/CLEVR_1.png", "COCO_train2014_000000000042.jpg", "n3.jpg", "x/y.png"]
    names += ["images/5/train-72-1-0.png"]
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(make_image(seed=seed))
    return ImageReader(FolderImages(root, max_bytes=10**6), ImageRules())


@pytest.fixture
def read(tmp_path, make_lines, reader):
    """Read records with a set of prompts: the texts of each document with IMG for a picture, or the reason."""

    def read_all(prompts: PromptSet, records, *, seed=0, name="records.jsonl", turns=VICUNA) -> list[str]:
        path = make_lines(tmp_path / name, records)
        source = PromptedSource((path,), PromptRules(prompts=prompts, seed=seed, turns=turns))
        return [_line(found.document) for found in source.read(path, reader)]

    return read_all


def _line(document) -> str:
    if isinstance(document, RejectError):
        return document.reason
    parts = []
    for segment in document.segments[1:]:
        parts.append(segment.text if isinstance(segment, Text) else "IMG" if hasattr(segment, "data") else "</s>")
    return "|".join(parts)


def one_wording(name: str, *, which: int = 0) -> PromptSet:
    prompts = load_prompt_set(name)
    return dataclasses.replace(prompts, prompts=(prompts.prompts[which],))


# What the published annotations of each set look like, one record a line as prompt_pools.yaml says how to make it;
# then the part of the prompt that comes from the record, and the answer.
PUBLISHED = {
    "image-paragraph-captioning": ({"image_id": 7, "url": "u", "paragraph": "A long text."}, "", "A long text."),
    "msr-vtt": (
        {"caption": "a man runs", "video_id": "video1", "sen_id": 3, "frames": ["a.jpg", "b.jpg"]},
        "",
        "a man runs",
    ),
    "textcaps": ({"image_id": "n3", "caption_str": "a stop sign", "reference_strs": ["x"]}, "", "a stop sign"),
    "clevr": (
        {"image_filename": "CLEVR_1.png", "question": "How many cubes?", "answer": "3", "question_index": 9},
        "How many cubes?",
        "3",
    ),
    "nlvr": ({"sentence": "There is a box.", "label": "true", "image": ["a.jpg", "b.jpg"]}, "There is a box.", "true"),
    "visualmrc": (
        {
            "id": "1",
            "image_filename": "a.jpg",
            "qa_data": [{"question": {"text": "Who?"}, "answer": {"text": "Ann is.", "relevant": [1]}}],
        },
        "Who?",
        "Ann is.",
    ),
    "multi30k": ({"image": "a.jpg", "en": "Two dogs.", "de": "Zwei Hunde."}, "Two dogs.", "Zwei Hunde."),
    "activitynet-qa": (
        {"video_name": "v", "question_id": "v_1", "question": "is he old", "answer": "no", "frames": ["a.jpg"] * 3},
        "is he old",
        "no",
    ),
    "docvqa": (
        {"questionId": 4, "question": "What date?", "image": "x/y.png", "answers": ["1/8/93", "1/8/1993", "1/8/93"]},
        "What date?",
        "1/8/93",
    ),
    "gqa": (
        {"id": "02930152", "imageId": "n3", "question": "Is it?", "answer": "yes", "fullAnswer": "Yes."},
        "Is it?",
        "yes",
    ),
    "ivqa": (
        {"frames": ["a.jpg"], "question": "What is cut?", "answer1": "an onion", "answer2": "onion"},
        "What is cut?",
        "an onion",
    ),
    "msrvtt-qa": ({"id": 1, "video_id": 2, "question": "who?", "answer": "man", "frames": ["b.jpg"]}, "who?", "man"),
    "msvd-qa": ({"id": 1, "video_id": 2, "question": "who?", "answer": "man", "image": "b.jpg"}, "who?", "man"),
    "ocr-vqa": (
        {"id": "7", "questions": ["Title?"], "answers": ["Moby Dick"], "imageURL": "http://x"},
        "Title?",
        "Moby Dick",
    ),
    "st-vqa": (
        {"file_path": "x/y.png", "question": "Which bus?", "answers": ["12", "12"], "question_id": 5},
        "Which bus?",
        "12",
    ),
    "viquae": (
        {
            "id": "q1",
            "input": "Where was he born?",
            "image": "a.jpg",
            "output": {"original_answer": "Ulm", "answer": ["Ulm"]},
        },
        "Where was he born?",
        "Ulm",
    ),
    "vqav2": (
        {
            "image_id": 42,
            "question": "What sport?",
            "question_id": 42001,
            "answers": [{"answer": a} for a in ("golf", "chess", "chess")],
        },
        "What sport?",
        "chess",
    ),
    "visual-dialog": (
        {"image_id": 42, "caption": "a dog", "dialog": [{"question": "big?", "answer": "no"}]},
        "big?",
        "no",
    ),
}


def test_nlvr_records_name_the_first_of_their_six_pictures(read):
    record = {"identifier": "72-1", "directory": "5", "sentence": "There is a box.", "label": "false"}
    (found,) = read(one_wording("nlvr"), [record])
    assert found.count("IMG") == 1
    assert found.endswith("ASSISTANT:| false|</s>")


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_records_of_every_set_become_conversations(read, name):
    record, question, answer = PUBLISHED[name]
    (found,) = read(one_wording(name), [record])
    asked, answered, end = found.rpartition(" ASSISTANT:|")[0], *found.rpartition(" ASSISTANT:|")[2].split("|")
    assert (answered, end) == (f" {answer}", "</s>")
    assert question in asked
    assert asked.startswith(" USER: |IMG|\n")
    assert asked.count("IMG") == len(record.get("frames", record["image"] if name == "nlvr" else [0]))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_wording_can_come_up_and_no_brace_is_left(read, name):
    record = PUBLISHED[name][0]
    prompts = load_prompt_set(name)
    extra = {"ocr_tokens": ["some", "words"], "context": "some text", "language": "German"}
    found = set()
    for seed in range(60):
        (line,) = read(prompts, [record | extra], seed=seed)
        assert "{" not in line
        found.add(line)
    assert len(found) == len(prompts.prompts)


def test_wording_depends_on_seed_and_key_alone(read):
    prompts = load_prompt_set("vqav2")
    records = [{"image": "a.jpg", "question": f"q{n}", "answer": "a", "question_id": n} for n in range(50)]
    straight = read(prompts, records)
    shuffled = random.Random(0).sample(records, 50)
    again = read(prompts, [{"x": 1}, *shuffled], name="another.jsonl")
    assert sorted(again[1:]) == sorted(straight)
    assert read(prompts, records, seed=1) != straight


def test_wording_of_a_record_without_a_key_depends_on_its_file_and_line(read):
    prompts = load_prompt_set("vqav2")
    records = [{"image": "a.jpg", "question": "q", "answer": "a"} for _ in range(50)]
    found = read(prompts, records)
    assert len(set(found)) == len(prompts.prompts)
    assert read(prompts, records[:20]) == found[:20]
    assert read(prompts, records, name="other.jsonl") != found


def test_wordings_are_chosen_evenly():
    counts = [0] * 5
    for number in range(5000):
        counts[choose(3, f"key {number}", 0, 5)] += 1
    assert min(counts) > 900


def test_every_caption_is_a_document_of_its_own(read):
    record = {"image": "a.jpg", "caption": ["one", "", "two"]}
    prompt = one_wording("textcaps").prompts[0]
    expected = [f" USER: |IMG|\n{prompt} ASSISTANT:| {text}|</s>" for text in ("one", "two")]
    assert read(one_wording("textcaps"), [record]) == [expected[0], "empty_text", expected[1]]


def test_lists_of_questions_and_answers_are_one_conversation(read):
    record = {"id": "7", "questions": ["Title?", "Author?"], "answers": ["Moby Dick", ["Melville"]]}
    prompts = dataclasses.replace(one_wording("ocr-vqa"), prompts=("<image>\nRead: {question}",))
    assert read(prompts, [record]) == [
        " USER: |IMG|\nRead: Title? ASSISTANT:| Moby Dick|</s>|USER: Read: Author? ASSISTANT:| Melville|</s>"
    ]


def test_a_dialog_asks_its_later_questions_plainly(read):
    rounds = [{"question": f"q{n}?", "answer": f"a{n}"} for n in range(3)]
    prompts = dataclasses.replace(one_wording("visual-dialog"), prompts=("Seen: {context}\n{question}",))
    assert read(prompts, [{"image": "a.jpg", "caption": "a cat", "dialog": rounds}]) == [
        " USER: |IMG|\nSeen: a cat\nq0? ASSISTANT:| a0|</s>|USER: q1? ASSISTANT:| a1|</s>|USER: q2? ASSISTANT:| a2|</s>"
    ]


def test_wordings_whose_parts_a_record_lacks_are_not_used(read):
    prompts = dataclasses.replace(load_prompt_set("st-vqa"), prompts=("{ocr}: {question}", "{question}"))
    record = {"image": "a.jpg", "question": "q?", "answer": "a"}
    assert set(read(prompts, [record] * 20)) == {" USER: |IMG|\nq? ASSISTANT:| a|</s>"}
    with_ocr = set(read(prompts, [record | {"ocr": ["b", "c"]}] * 20))
    assert with_ocr == {f" USER: |IMG|\n{text}q? ASSISTANT:| a|</s>" for text in ("", "b, c: ")}
    only = dataclasses.replace(prompts, prompts=("{ocr}: {question}",))
    assert read(only, [record]) == ["field_missing"]


@pytest.fixture
def choice(tmp_path) -> PromptSet:
    (tmp_path / "pool.yaml").write_text(
        "mine:\n  title: T\n  kind: multiple_choice\n  answer: '{letter}. {answer}'\n"
        "  fields: {image: [image], question: [q], options: [choices], answer: [label]}\n"
        "  prompts: ['{question}\n\n    {options}']\n"
    )
    return load_section(PromptSet, tmp_path / "pool.yaml", "mine")


@pytest.mark.parametrize("label", [1, "B", "dog"])
@pytest.mark.parametrize("options", [["cat", "dog"], {"A": "cat", "B": "dog"}])
def test_multiple_choice_lists_the_options_by_letter(read, choice, options, label):
    record = {"image": "a.jpg", "q": "Which?", "choices": options, "label": label}
    assert read(choice, [record]) == [" USER: |IMG|\nWhich?\nA. cat\nB. dog ASSISTANT:| B. dog|</s>"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": 2}, "answer_option"),
        ({"label": "C"}, "answer_option"),
        ({"label": True}, "answer_option"),
        ({"choices": "cat"}, "json_type"),
        ({"choices": ["x"] * 27}, "json_type"),
        ({"choices": [["x"]]}, "json_type"),
        ({"choices": []}, "field_missing"),
    ],
)
def test_wrong_options_are_rejected(read, choice, change, reason):
    assert read(choice, [{"image": "a.jpg", "q": "?", "choices": ["cat", "dog"], "label": 0} | change]) == [reason]


GOOD = {"image": "a.jpg", "question": "q?", "answer": "a"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": None}, "image_missing"),
        ({"image": []}, "image_missing"),
        ({"image": "none.jpg"}, "image_missing"),
        ({"image": 5}, "json_type"),
        ({"question": ""}, "field_missing"),
        ({"question": {"x": 1}}, "json_type"),
        ({"question": ["q", "r"]}, "answer_count"),
        ({"question": ["q", "r"], "answer": ["a"]}, "answer_count"),
        ({"answer": None}, "field_missing"),
        ({"answer": " "}, "empty_text"),
        ({"answer": [["a"]]}, "json_type"),
        ({"question": "a\x07"}, "control_character"),
        ({"question": "x" * 600_000}, "text_too_long"),
    ],
)
def test_bad_annotation_is_rejected_with_line_and_key_and_its_neighbours_are_intact(
    tmp_path, make_lines, reader, change, reason
):
    path = make_lines(tmp_path / "a.jsonl", [GOOD, GOOD | {"question_id": 8} | change, GOOD, b"{"])
    source = PromptedSource((path,), PromptRules(prompts=one_wording("vqav2")))
    found = list(source.read(path, reader))
    reasons = [one.document.reason if isinstance(one.document, RejectError) else None for one in found]
    assert reasons == [None, reason, None, "json_syntax"]
    assert (found[1].line, found[1].key) == (2, "8")


def test_numbers_and_truth_values_are_text_and_placeholders_in_records_are_not_images(read):
    record = {"image": "a.jpg", "sentence": "an <image> of 3", "label": True}
    prompts = dataclasses.replace(one_wording("nlvr"), prompts=("{statement}",))
    assert read(prompts, [record]) == [" USER: |IMG|\nan <IMAGE> of 3 ASSISTANT:| true|</s>"]
    assert read(one_wording("clevr"), [GOOD | {"answer": 3}])[0].endswith("ASSISTANT:| 3|</s>")


def test_raw_base64_of_m3it_is_read(read, make_image):
    encoded = base64.b64encode(make_image(seed=1)).decode()
    (found,) = read(one_wording("gqa"), [{"image_str": encoded, "question": "q?", "answer": "a"}])
    assert found.startswith(" USER: |IMG|\nq?")


def test_parquet_and_json_give_the_same_documents(tmp_path, make_lines, make_table, reader):
    records = [GOOD | {"question": f"q{n}", "question_id": n} for n in range(10)]
    lines = make_lines(tmp_path / "a.jsonl", records)
    table = make_table(tmp_path / "a.parquet", {name: [record[name] for record in records] for name in records[0]})
    rules = PromptRules(prompts=load_prompt_set("vqav2"))
    found = [[one.document for one in PromptedSource((p,), rules).read(p, reader)] for p in (lines, table)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a", 1),
        ("b.c", 2),
        ("d.e", [3, 4]),
        ("d.f.g", None),
        ("x", None),
        ("a.b", None),
        ("{a:03d}.jpg", "001.jpg"),
        ("{x}.jpg", None),
        ("{b:d}", None),
        ("e.f", 5),
    ],
)
def test_names_of_fields_are_followed_into_objects_and_lists(name, expected):
    record = {"a": 1, "b": {"c": 2}, "d": [{"e": 3}, {"e": 4, "f": {"g": 5}}], "e.f": 5}
    assert find_value(record, name) == expected


def test_rules_are_plain_values_for_the_manifest():
    rules = dataclasses.asdict(PromptRules(prompts=load_prompt_set("gqa"), seed=4))
    assert json.loads(json.dumps(rules))["prompts"]["title"] == "GQA"
