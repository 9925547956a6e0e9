"""Every door of an exported folder gives the ids of training."""

import functools
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.config import ModelConfig
from megatron_vlm.convert.files.tokenizers.sentence_piece import tokenizer_json
from megatron_vlm.convert.to_hf import ExportOptions, export_model
from megatron_vlm.data.documents import Image, Text
from megatron_vlm.data.samples import ImageSegment
from megatron_vlm.data.text.templates import DEFAULT_SYSTEM, TEMPLATES, Turn, encode_prompt
from megatron_vlm.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_vlm.data.text.tokenizer_files import find_tokenizer
from megatron_vlm.evaluation.prompts import Exchange, PromptFormat
from tests.support import hf_doors
from tests.support.byte_pair import HOSTILE, write_llama_3, write_smollm2
from tests.support.configs import tiny_model
from tests.support.sentence_piece import NUM_PIECES, train_sentence_piece

CASES = (
    ("sentence_piece", "vicuna_v1", DEFAULT_SYSTEM),
    ("sentence_piece", "vicuna_v1", None),
    ("sentence_piece", "vicuna_v1", "It's \\ {a} test."),
    ("sentence_piece", "llama_2", DEFAULT_SYSTEM),
    ("sentence_piece", "hermes-2", DEFAULT_SYSTEM),
    ("sentence_piece", "llama_3", None),
    ("yi", "hermes-2", DEFAULT_SYSTEM),
    ("yi", "vicuna_v1", None),
    ("llama_2_json", "llama_2", None),
    ("llama_2_json", "hermes-2", DEFAULT_SYSTEM),
    ("llama_3", "llama_3", DEFAULT_SYSTEM),
    ("llama_3", "vicuna_v1", None),
    ("smollm2", "chatml", DEFAULT_SYSTEM),
)
"""Tokenizer, template, system prompt."""
ROOT = Path(__file__).parents[3]
TRANSFORMERS_5 = Path(os.environ.get("VENV_TRANSFORMERS5", ROOT / ".venv-transformers5")) / "bin/python"
SYMBOLS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
IMAGE = Image(b"")
BOS = "BOS"
"""Stands for the text of BOS."""
BARE = (
    "What colour is the circle?",
    "<image>\nWhat is it?",
    "Look: <image> and <image>\nA dog",
    " two blanks",
    BOS + "a cat",
)
CHATS = (
    (Turn((Text("What colour is it?"),), None),),
    (Turn((IMAGE, Text("\nWhat is it? <b>12</b> {x}")), None),),
    (
        Turn((IMAGE, Text("\nWhat colour is the circle?")), "red, and it's not blue"),
        Turn((Text("Is there a triangle?"),), "no"),
        Turn((IMAGE, IMAGE, Text("\nHow many shapes?")), None),
    ),
)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, Path]:
    """Folders of tokenizers by name; all have the markers of the templates that they are tested with."""
    folders = {name: tmp_path_factory.mktemp(name) for name, *_ in CASES}
    train_sentence_piece(folders["sentence_piece"], symbols=SYMBOLS)
    train_sentence_piece(folders["yi"])
    # Like Nous-Hermes-2-Yi: no BOS, and markers behind the vocabulary, of which one ends a sample.
    config = {"add_bos_token": False, "eos_token": "<|im_end|>"}
    (folders["yi"] / "tokenizer_config.json").write_text(json.dumps(config))
    markers = {text: NUM_PIECES + number for number, text in enumerate(SYMBOLS)}
    (folders["yi"] / "added_tokens.json").write_text(json.dumps(markers))
    write_llama_3(folders["llama_3"])
    write_smollm2(folders["smollm2"])
    _write_llama_2_json(folders["llama_2_json"], folders["sentence_piece"])
    return folders


def _write_llama_2_json(folder: Path, sentence_piece: Path) -> None:
    """Write what Hugging Face makes of a SentencePiece model: a word-begin mark after every added token."""
    source = load_tokenizer(sentence_piece)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    names = ("<s>", "</s>", *SYMBOLS)
    tree = tokenizer_json(
        source, [{"id": source.piece_id(name), "content": name, **flags} for name in names], "<image>"
    )
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tree["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, blank]}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def export(make_run, tokenizers, tmp_path_factory):
    """Return a folder and its model, made once: export(tokenizer, template, system)."""

    @functools.cache
    def write(tokenizer: str, template: str, system: object) -> tuple[Path, ModelConfig]:
        folder = tmp_path_factory.mktemp("doors") / "hf"
        model = tiny_model(vocab_size=load_tokenizer(tokenizers[tokenizer]).vocab_size)
        settings = replace(read_run_settings(make_run(model)), tokenizer=find_tokenizer(tokenizers[tokenizer]))
        export_model(settings, folder, ExportOptions(template=template, system=system))
        return folder, model

    return write


def message_of(role: str, segments: tuple[Text | Image, ...]) -> dict:
    """Return a message; the line break after an image is the template's."""
    content, follows_image = [], False
    for segment in segments:
        if isinstance(segment, Image):
            content.append({"type": "image"})
        else:
            content.append({"type": "text", "text": segment.text.removeprefix("\n") if follows_image else segment.text})
        follows_image = isinstance(segment, Image)
    return {"role": role, "content": content}


def messages_of(turns: tuple[Turn, ...]) -> list[dict]:
    messages = []
    for turn in turns:
        messages.append(message_of("user", turn.question))
        if turn.answer is not None:
            messages.append(message_of("assistant", (Text(turn.answer),)))
    return messages


def with_line_breaks(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Return the turns as LLaVA has them: a line break after every image."""

    def question(segments):
        for place, segment in enumerate(segments):
            yield segment
            if isinstance(segment, Image) and isinstance(segments[place + 1], Image):
                yield Text("\n")

    return tuple(replace(turn, question=tuple(question(turn.question))) for turn in turns)


def ids_of_chat(turns: tuple[Turn, ...], tokenizer: Tokenizer, model: ModelConfig, template: str, system: object):
    """Return the ids of training, each image as one placeholder."""
    ids: list[int] = []
    for segment in encode_prompt(with_line_breaks(turns), tokenizer, template=TEMPLATES[template], system=system):
        image = isinstance(segment, ImageSegment)
        ids += [model.language.image_token_id] if image else segment.input_ids.tolist()
    return ids


def ids_of_bare(text: str, tokenizer: Tokenizer, model: ModelConfig):
    """Return the ids of `generate` without a template, each image as one placeholder."""
    prompts = PromptFormat(tokenizer=tokenizer, model=model, template=None, system=None)
    ids = prompts.encode([Exchange(text.removeprefix(BOS), text.count("<image>"))]).tolist()
    image, per_image = model.language.image_token_id, model.constant_image_tokens
    return [one for place, one in enumerate(ids) if one != image or ids[:place].count(image) % per_image == 0]


def requests(tokenizer: Tokenizer) -> list:
    return [*map(messages_of, CHATS), *(text.replace(BOS, tokenizer.bos) for text in BARE)]


def assert_doors_agree(answers: dict, model: ModelConfig, tokenizer: Tokenizer, template: str, system: object) -> None:
    wanted = [
        *(ids_of_chat(turns, tokenizer, model, template, system) for turns in CHATS),
        *(ids_of_bare(text, tokenizer, model) for text in BARE),
    ]
    image, per_image = model.language.image_token_id, model.constant_image_tokens
    for ids, doors in zip(wanted, answers["ids"], strict=True):
        expanded = [one for token in ids for one in [token] * (per_image if token == image else 1)]
        for door, found in doors.items():
            assert found == (expanded if door.startswith("processor") else ids), door
    # Nothing that `generate` of a Llama rejects.
    assert answers["inputs"] == ["attention_mask", "input_ids", "pixel_values"]
    assert answers["num_generated"] > 0


@pytest.mark.parametrize(("name", "template", "system"), CASES)
def test_every_door_of_transformers_4_gives_the_ids_of_training(name, template, system, export, tokenizers):
    folder, model = export(name, template, system)
    answers = hf_doors.answer(folder, requests(load_tokenizer(tokenizers[name])))
    assert_doors_agree(answers, model, load_tokenizer(tokenizers[name]), template, system)


@pytest.mark.slow
@pytest.mark.skipif(not TRANSFORMERS_5.exists(), reason="needs bash tests/convert/setup_transformers5.sh")
def test_so_does_every_door_of_transformers_5(export, tokenizers):
    asked = [[str(export(*case)[0]), requests(load_tokenizer(tokenizers[case[0]]))] for case in CASES]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [TRANSFORMERS_5, hf_doors.__file__]
    done = subprocess.run(command, input=json.dumps(asked), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (name, template, system), answers in zip(CASES, json.loads(done.stdout), strict=True):
        model = export(name, template, system)[1]
        assert_doors_agree(answers, model, load_tokenizer(tokenizers[name]), template, system)


@pytest.mark.parametrize("name", ["llama_2_json", "llama_3", "smollm2"])
def test_an_exported_tokenizer_json_is_read_as_the_one_that_it_came_from(name, export, tokenizers):
    folder, _ = export(*next(case for case in CASES if case[0] == name))
    found, source = load_tokenizer(folder), load_tokenizer(tokenizers[name])
    assert found.sha256 == source.sha256


@pytest.mark.parametrize("continuation", [True, False])
def test_that_of_a_sentence_piece_model_does_the_same_without_the_model(continuation, export, tokenizers, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(export(*CASES[0])[0] / name, tmp_path)
    found, source = load_tokenizer(tmp_path), load_tokenizer(tokenizers["sentence_piece"])
    assert (found.bos_id, found.eos_id, found.vocab_size) == (source.bos_id, source.eos_id, source.vocab_size)
    for text in HOSTILE:
        wanted = source.encode(text, continuation=continuation)
        assert found.encode(text, continuation=continuation) == wanted
        assert found.decode(wanted, continuation=continuation) == source.decode(wanted, continuation=continuation)


@pytest.fixture(scope="module")
def tokenize(export):
    """Return the ids of a text: tokenize(text, add_special_tokens=True)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export(*CASES[0])[0])
    return lambda text, **options: tokenizer(text, **options)["input_ids"]


def test_bos_is_written_once_with_and_without_special_tokens(tokenize):
    both = [tokenize(text, add_special_tokens=adds) for text in ("a cat", "<s>a cat") for adds in (True, False)]
    assert all(ids == both[0] and ids.count(1) == 1 for ids in both)


@pytest.mark.parametrize("token", ["<s>", "</s>", "<image>", "<|im_start|>"])
def test_an_added_token_alone_stays_alone(tokenize, token):
    assert len(tokenize(token)) == 1
