"""`prepare conversations` and `prepare text` from the command line, with every form of record and with prompts."""

import base64
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image as PILImage

from megatron_vlm.cli.main import main
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.manifest import load_manifest
from megatron_vlm.data.text.tokenizer import load_tokenizer
from tests.support.sentence_piece import train_sentence_piece


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """A picture, a tokenizer, and the same instruction in the forms of LLaVA, M3IT, OpenAI and VQAv2."""
    root = tmp_path_factory.mktemp("raw")
    train_sentence_piece(root)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    PILImage.fromarray(pixels).save(root / "a.png")
    encoded = base64.b64encode((root / "a.png").read_bytes()).decode()
    turns = [{"from": "human", "value": "<image>\nIs it red?"}, {"from": "gpt", "value": "No"}]
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    messages = [
        {"role": "user", "content": [part, {"type": "text", "text": "Is it red?"}]},
        {"role": "assistant", "content": "No"},
    ]
    m3it = {"instruction": "Is it ", "inputs": "red?", "image_base64_str": [encoded], "outputs": "No"}
    records = {
        "llava.json": [{"image": "a.png", "conversations": turns}],
        "messages.json": [{"messages": messages}],
        "m3it.json": [m3it],
        "plain.json": [{"question": "Is it red?", "answer": "No", "image": "a.png"}],
        "text.json": [{"question": "Is it red?", "answer": "No"}, {"caption": "x"}],
    }
    for name, values in records.items():
        (root / name).write_text(json.dumps(values))
    pyarrow.parquet.write_table(pyarrow.table({name: [value] for name, value in m3it.items()}), root / "m3it.parquet")
    for number in range(3):
        lines = [
            {"image": "a.png", "question": "red?", "answers": [{"answer": "no"}], "question_id": 10 * number + row}
            for row in range(4)
        ]
        (root / f"vqa-{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def prepare(raw, kind, names, output, *more) -> int:
    inputs = [str(raw / name) for name in names]
    options = ["--output", str(output), "--tokenizer", str(raw / "tokenizer.model")]
    return main(["prepare", kind, "--input", *inputs, *options, "--workers", "1", *more])


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name[0].isdigit()}


@pytest.mark.parametrize("name", ["messages.json", "m3it.json", "m3it.parquet", "plain.json"])
def test_every_form_gives_the_sample_that_llava_gives(raw, tmp_path, name):
    assert prepare(raw, "conversations", ["llava.json"], tmp_path / "llava") == 0
    assert prepare(raw, "conversations", [name], tmp_path / "other") == 0
    assert shard_bytes(tmp_path / "other") == shard_bytes(tmp_path / "llava")


def test_unknown_form_is_among_the_rejects_with_its_line_and_fields(raw, tmp_path, capsys):
    assert prepare(raw, "text", ["text.json"], tmp_path / "d") == 0
    assert "documents 2 = used 1 + rejected 1 (unknown_fields 1)" in capsys.readouterr().out
    (row,) = map(json.loads, (tmp_path / "d" / "rejects.jsonl").read_text().splitlines())
    assert (row["file"], row["line"]) == ("text.json", 1)
    assert "has the fields caption" in row["detail"]


VQA = ["vqa-0.jsonl", "vqa-1.jsonl", "vqa-2.jsonl"]


def test_annotations_are_asked_in_the_wordings_of_their_set(raw, tmp_path):
    assert prepare(raw, "conversations", VQA, tmp_path / "d", "--prompts", "vqav2", "--seed", "3") == 0
    manifest = load_manifest(tmp_path / "d")
    assert manifest.dataset_name == "vqav2"
    assert manifest.counts.samples == manifest.counts.images == 12
    assert manifest.options["rules"]["seed"] == 3
    assert manifest.options["rules"]["prompts"]["title"] == "VQAv2"
    tokenizer = load_tokenizer(raw / "tokenizer.model")
    dataset = ShardedDataset.open(tmp_path / "d")
    asked = {tokenizer.decode(dataset[i].segments[2].input_ids) for i in range(len(dataset))}
    assert len(asked) > 3
    assert tokenizer.decode(dataset[0].segments[0].input_ids) == " USER: "  # VILA's code gives them no system prompt
    assert all("red?" in text for text in asked)


def test_a_source_that_the_user_names_goes_before_that_of_the_prompts(raw, tmp_path):
    options = ("--prompts", "vqav2", "--source", "llava")
    assert prepare(raw, "conversations", VQA, tmp_path / "d", *options) == 0
    assert load_manifest(tmp_path / "d").dataset_name == "llava"


def test_prompts_do_not_depend_on_workers_parts_or_the_name_of_the_source(raw, tmp_path):
    options = ("--prompts", "vqav2")
    assert prepare(raw, "conversations", VQA, tmp_path / "a", *options) == 0
    assert prepare(raw, "conversations", VQA, tmp_path / "b", *options, "--workers", "2", "--source", "mine") == 0
    assert load_manifest(tmp_path / "b").dataset_name == "mine"
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")


def test_system_prompt_is_given_to_annotations_on_request(raw, tmp_path):
    options = ("--prompts", "vqav2", "--system", "default")
    assert prepare(raw, "conversations", VQA, tmp_path / "d", *options) == 0
    assert load_manifest(tmp_path / "d").options["rules"]["turns"]["system"] == "default"


def test_another_seed_is_another_dataset_and_refused_in_the_same_folder(raw, tmp_path, capsys):
    assert prepare(raw, "conversations", VQA, tmp_path / "a", "--prompts", "vqav2") == 0
    assert prepare(raw, "conversations", VQA, tmp_path / "b", "--prompts", "vqav2", "--seed", "1") == 0
    assert shard_bytes(tmp_path / "a") != shard_bytes(tmp_path / "b")
    assert prepare(raw, "conversations", VQA, tmp_path / "a", "--prompts", "vqav2", "--seed", "1") == 78
    assert "differs in options: rules.seed 0, now 1" in capsys.readouterr().err


def test_own_prompt_file_is_used_and_checked_before_reading(raw, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    content = "mine:\n  title: T\n  kind: question\n  fields: {image: [image], question: [question], answer: [%s]}\n"
    path.write_text(content % "answers.answer" + "  prompts: ['Colour: {question}']\n")
    options = ("--prompts", "mine", "--prompt-file", str(path))
    assert prepare(raw, "conversations", VQA, tmp_path / "d", *options) == 0
    path.write_text(content % "a" + "  prompts: ['{hint}']\n")
    assert prepare(raw, "conversations", VQA, tmp_path / "e", *options) == 78
    assert "prompts[0]: {hint} cannot be used here" in (error := capsys.readouterr().err)
    assert f"{path}:1" in error
    assert not (tmp_path / "e").exists()


def test_unknown_set_is_exit_code_64(raw, tmp_path, capsys):
    assert prepare(raw, "conversations", VQA, tmp_path / "d", "--prompts", "vqa") == 64
    assert "no prompts for 'vqa'" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--seed", "1"), ("--prompt-file", "x.yaml")])
def test_options_of_prompts_need_a_set(raw, tmp_path, option, capsys):
    assert prepare(raw, "conversations", ["llava.json"], tmp_path / "d", *option) == 64
    assert f"{option[0]} has no effect without --prompts" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["conversations", "text"])
def test_help_lists_the_forms_of_records(kind, capsys):
    with pytest.raises(SystemExit):
        main(["prepare", kind, "--help"])
    text = capsys.readouterr().out
    assert "instruction, inputs, outputs" in text
    assert "messages: [{role, content}, ...]" in text
