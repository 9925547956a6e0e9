import functools
from importlib import resources
from pathlib import Path

import pytest
import yaml

from megatron_vlm.config import ConfigError, UsageError
from megatron_vlm.data.sources.instructions.prompt_pools import (
    KINDS,
    fill,
    load_prompt_set,
    prompt_set_names,
    without_image_places,
)

load_packaged = functools.lru_cache(load_prompt_set)
PACKAGED = Path(str(resources.files("megatron_vlm.data.sources.instructions").joinpath("prompt_pools.yaml")))
# VILA, arXiv:2312.07533, table 10.
TABLE_10 = {
    "Image Paragraph Captioning": "caption",
    "MSR-VTT": "caption",
    "TextCaps": "caption",
    "CLEVR": "question",
    "NLVR": "statement",
    "VisualMRC": "reading",
    "Multi30k": "translation",
    "ActivityNet-QA": "question",
    "DocVQA": "reading",
    "GQA": "question",
    "iVQA": "question",
    "MSRVTT-QA": "question",
    "MSVD-QA": "question",
    "OCR-VQA": "reading",
    "ST-VQA": "reading",
    "ViQuAE": "question",
    "VQAv2": "question",
    "Visual Dialog": "dialog",
}


def test_the_packaged_sets_are_the_18_of_the_paper():
    sets = [load_packaged(name) for name in prompt_set_names(PACKAGED)]
    assert {one.title: one.kind for one in sets} == TABLE_10


@pytest.mark.parametrize("name", prompt_set_names(PACKAGED))
def test_a_packaged_set_has_five_wordings_that_plain_records_can_use(name):
    prompts = load_packaged(name)
    kind = KINDS[prompts.kind]
    assert len(set(prompts.prompts)) == len(prompts.prompts) >= 5
    optional = [part for part in kind.optional if part in prompts.fields]
    plain = [text for text in prompts.prompts if not any(f"{{{part}}}" in text for part in optional)]
    assert len(plain) >= 3
    for part in ("image", *kind.needed, kind.answer):
        assert part in prompts.fields[part], f"a record with a field {part} is not taken"


def test_no_wording_is_used_twice_over_all_sets():
    wordings = [text for name in prompt_set_names(PACKAGED) for text in load_packaged(name).prompts]
    assert len(set(wordings)) == len(wordings)


@pytest.fixture
def pool(tmp_path):
    """Write a file with one set, which the arguments change; return its path."""
    base = {
        "title": "T",
        "kind": "question",
        "fields": {"image": ["image"], "question": ["q", "question"], "answer": ["a"]},
        "prompts": ["{question}?"],
    }

    def write(**changes) -> Path:
        tree = {name: value for name, value in (base | changes).items() if value is not None}
        path = tmp_path / "pool.yaml"
        path.write_text(yaml.safe_dump({"mine": tree, "other": tree}, sort_keys=False))
        return path

    return write


def test_own_file_is_read(pool):
    prompts = load_prompt_set("mine", pool(answer="It is {answer}."))
    assert (prompts.title, prompts.fields["question"]) == ("T", ("q", "question"))
    assert prompts.answer_text == "It is {answer}."


def test_answer_is_trained_as_it_is_by_default(pool):
    assert load_prompt_set("mine", pool()).answer_text == "{answer}"
    fields = {"source": ["en"], "translation": ["de"]}
    assert load_prompt_set("mine", pool(kind="translation", fields=fields, prompts=["{source}"])).answer_text == (
        "{translation}"
    )


FIELDS = {"image": ["image"], "question": ["q"], "answer": ["a"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ["{question} {hint}"]}, r"prompts\[0\]: {hint} cannot be used here .*fix: use {question}"),
        ({"prompts": ["ok {question}", "{context} {question}"]}, r"prompts\[1\]: {context} cannot be used here"),
        ({"prompts": ["{question} {answer}"]}, r"prompts\[0\]: {answer} cannot be used here"),
        ({"prompts": ["{question!r}"]}, r"prompts\[0\]: {question} cannot be used here"),
        ({"prompts": ["{question:>9}"]}, r"prompts\[0\]: {question} cannot be used here"),
        ({"prompts": ["{question.x}"]}, r"prompts\[0\]: {question.x} cannot be used here"),
        ({"prompts": ["{question"]}, r"prompts\[0\]: expected '}' before end of string"),
        ({"prompts": ["{question} }"]}, r"prompts\[0\]: Single '}'"),
        ({"prompts": ["what?"]}, r"prompts\[0\] lacks {question}"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": "{question}"}, "mine.prompts='{question}' is not a list"),
        ({"prompts": [5]}, r"mine.prompts\[0\]=5 is not str"),
        ({"prompts": None}, "missing value mine.prompts"),
        ({"later_prompts": ["{hint}"]}, r"later_prompts\[0\]: {hint} cannot be used here"),
        ({"later_prompts": ["<image> {question}"]}, r"later_prompts\[0\] has <image>"),
        ({"answer": "yes"}, "answer has no {answer}"),
        ({"answer": "{question}"}, "answer: {question} cannot be used here"),
        ({"fields": FIELDS | {"hint": ["x"]}}, "fields.hint: kind question has no such slot"),
        ({"fields": FIELDS | {"answer": []}}, "fields.answer names no field"),
        ({"fields": FIELDS | {"answer": [""]}}, "fields.answer names no field"),
        ({"fields": FIELDS | {"answer": "a"}}, "mine.fields.answer='a' is not a list"),
        ({"fields": {"image": ["image"], "question": ["q"]}}, "fields.answer is missing, which kind question needs"),
        ({"fields": {"image": ["image"], "answer": ["a"]}}, "fields.question is missing"),
        ({"fields": FIELDS | {"image": ["{a.b}.jpg"]}}, r"fields.image: {a.b} is not the name of a field"),
        ({"fields": FIELDS | {"image": ["{}.jpg"]}}, r"fields.image: {} is not the name of a field"),
        ({"fields": FIELDS | {"image": ["{id.jpg"]}}, "fields.image: expected '}'"),
        ({"kind": "riddle"}, "mine.kind='riddle' is not one of caption, question"),
        ({"promts": ["x"]}, "unknown key mine.promts .*did you mean mine.prompts"),
    ],
)
def test_wrong_set_is_refused_with_file_and_key(pool, changes, message):
    path = pool(**changes)
    with pytest.raises(ConfigError, match=message) as caught:
        load_prompt_set("mine", path)
    assert str(path) in str(caught.value)


def test_unknown_set_names_the_choices(pool):
    with pytest.raises(UsageError, match="no prompts for 'vqa' .*pool.yaml.; fix: choose from mine, other"):
        load_prompt_set("vqa", pool())
    with pytest.raises(UsageError, match="no prompts for 'vqa_v2'.*did you mean vqav2"):
        load_prompt_set("vqa_v2")


def test_file_that_is_missing_or_no_yaml_is_named(tmp_path):
    with pytest.raises(ConfigError, match="config file does not exist .*none.yaml"):
        load_prompt_set("mine", tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("mine: {")
    with pytest.raises(ConfigError, match="not valid YAML: .*bad.yaml"):
        load_prompt_set("mine", tmp_path / "bad.yaml")


def test_braces_of_the_parts_stay_and_doubled_braces_become_single():
    assert fill("{{x}} {question} {{", {"question": "{y} {question}"}) == "{x} {y} {question} {"


def test_later_questions_have_no_place_for_images(pool):
    prompts = load_prompt_set("mine", pool(prompts=["<image>\n{question}", "see <image> {question}"]))
    assert without_image_places(prompts) == ("{question}", "see  {question}")
    assert without_image_places(load_prompt_set("visual-dialog")) == ("{question}",)
