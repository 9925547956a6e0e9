import json

import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.data.text.tokenizer_files import find_tokenizer, read_tokenizer_files
from tests.support.byte_pair import write_llama_3, write_smollm2


def test_a_folder_with_a_tokenizer_model_is_loaded(tokenizer_path, tmp_path, tokenizer):
    write_smollm2(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.json"
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256, "before a tokenizer.json, which is made from it"


def test_a_file_with_another_name_stands_for_itself(tokenizer_path, tmp_path, tokenizer):
    (tmp_path / "other.model").write_bytes(tokenizer_path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    assert load_tokenizer(tmp_path / "other.model").sha256 == tokenizer.sha256


@pytest.mark.parametrize("name", ["folder", "file"])
def test_a_copy_is_the_same_tokenizer_and_leaves_nothing_of_another(name, tokenizer_path, tmp_path):
    source, target = write_llama_3(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    (target / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    (target / "added_tokens.json").write_text("{}")
    (target / "config.yaml").write_text("kept")
    path = source if name == "folder" else source / "tokenizer.json"
    read_tokenizer_files(path).copy_to(target)
    assert load_tokenizer(target).facts == load_tokenizer(source).facts
    assert {file.name for file in target.iterdir()} == {"config.yaml", "tokenizer.json", "tokenizer_config.json"}


def test_a_copied_model_gets_its_usual_name(tokenizer_path, tmp_path):
    read_tokenizer_files(tokenizer_path).copy_to(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.model"]


def test_missing_file_names_the_fix(tmp_path):
    with pytest.raises(ConfigError, match="No such file.*none.model.*fix: give a tokenizer.model"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(ConfigError, match="folder has no tokenizer.model and no tokenizer.json"):
        load_tokenizer(tmp_path)


def test_an_empty_tokenizer_file_is_named_as_such(tmp_path):
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"tokenizer file is empty \(.*empty.model\)"):
        load_tokenizer(tmp_path / "empty.model")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", r"no JSON.*tokenizer_config.json"),
        ("tokenizer_config.json", "[]", r"no JSON object.*tokenizer_config.json"),
        ("added_tokens.json", '{"a": "b"}', "list of added tokens is damaged"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": 2}}', "list of added tokens is damaged"),
        ("tokenizer.json", "{" * 100_000, "no JSON"),
    ],
)
def test_damaged_files_are_refused_in_one_line(name, content, message, tmp_path):
    write_smollm2(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(tmp_path)


def test_settings_are_read_in_every_form_that_hugging_face_writes(tmp_path):
    write_smollm2(tmp_path)
    config = {
        "bos_token": {"content": "<a>"},
        "eos_token": None,
        "extra_special_tokens": {"image_token": "<i>"},
        "additional_special_tokens": [{"content": "<b>"}, "<c>"],
        "image_token": "<i>",
        "chat_template": [{"name": "default", "template": "{{ bos_token }}"}],
        "add_bos_token": False,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<e>", "pad_token": "<p>"}))
    settings = read_tokenizer_files(tmp_path).settings()
    assert (settings.bos, settings.eos, settings.adds_bos) == ("<a>", "<e>", False)
    assert settings.template_writes_bos
    assert settings.placeholders == {"<image>", "<i>", "<p>"}
    assert settings.control == {"<a>", "<e>", "<i>", "<b>", "<c>", "<p>"}
