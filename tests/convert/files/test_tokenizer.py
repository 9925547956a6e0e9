"""The tokenizer of an exported folder, read again by this project and by transformers; those of other folders."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.checkpoint.tensors import read_tensor
from megatron_vlm.config import CheckpointError
from megatron_vlm.convert.from_hf import ImportOptions, import_model, import_parts
from megatron_vlm.convert.to_hf import ExportOptions, export_model
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.data.text.tokenizer_files import find_tokenizer
from tests.support.byte_pair import HOSTILE, write_llama_3, write_smollm2
from tests.support.configs import tiny_model
from tests.support.sentence_piece import NUM_PIECES, train_sentence_piece

WRITERS = {"sentence_piece": train_sentence_piece, "llama_3": write_llama_3, "smollm2": write_smollm2}
TEMPLATES = {"sentence_piece": "vicuna_v1", "llama_3": "llama_3", "smollm2": "chatml"}
EMBEDDING = "model.language_model.embedding.word_embeddings.weight"


@pytest.fixture(scope="module", params=WRITERS)
def export(request, make_run, tmp_path_factory):
    """A tokenizer and a folder exported with it: (tokenizer, folder, name)."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("export") / "hf"
    WRITERS[request.param](source)
    tokenizer = load_tokenizer(source)
    run = make_run(tiny_model(vocab_size=tokenizer.vocab_size))
    settings = replace(read_run_settings(run), tokenizer=find_tokenizer(source))
    export_model(settings, folder, ExportOptions(template=TEMPLATES[request.param]))
    return tokenizer, folder, request.param


def test_the_exported_tokenizer_is_that_of_the_training(export):
    tokenizer, folder, _ = export
    assert replace(load_tokenizer(folder).facts, name="") == replace(tokenizer.facts, name="")


def test_both_files_are_there_where_the_source_is_a_sentence_piece_model(export):
    _, folder, name = export
    assert (folder / "tokenizer.json").exists()
    assert (folder / "tokenizer.model").exists() == (name == "sentence_piece")


def test_an_import_takes_the_tokenizer_over(export, tmp_path):
    tokenizer, folder, _ = export
    model = import_model(folder, tmp_path / "run")
    settings = read_run_settings(tmp_path / "run")
    assert model.language.vocab_size == tokenizer.vocab_size
    assert settings.tokenizer.parent == tmp_path / "run"
    assert load_tokenizer(settings.tokenizer).sha256 == tokenizer.sha256


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_transformers_cuts_text_as_training_did(export, text):
    from transformers import AutoTokenizer

    tokenizer, folder, _ = export
    theirs = AutoTokenizer.from_pretrained(folder)
    for name in theirs.get_added_vocab():
        text = text.replace(name, "")  # transformers takes them for control tokens, and so does every server
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if text:  # the library has no rule for a text that is not there
        assert theirs(text)["input_ids"] == bos + tokenizer.encode(text)
    if "▁" not in text:  # SentencePiece writes a blank like this
        assert theirs.decode(tokenizer.encode(text)) == text


def test_generation_ends_where_evaluation_does(export):
    tokenizer, folder, name = export
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    wanted = {"llama_3": [tokenizer.eos_id, tokenizer.piece_id("<|eot_id|>")]}
    assert ends == wanted.get(name, tokenizer.eos_id)


def save_parts(folder, tokenizer_files, *, rows):
    """Save a Llama and a CLIP tower; copy a tokenizer to the Llama."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=rows, **sizes)).save_pretrained(folder / "llama")
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder / "clip")
    for file in tokenizer_files.iterdir():
        shutil.copy(file, folder / "llama")
    return folder / "llama", folder / "clip"


@pytest.mark.parametrize("rows", [NUM_PIECES + 2, NUM_PIECES + 30, NUM_PIECES + 200])
def test_rows_of_tokens_that_the_folder_adds_stay(rows, tmp_path):
    """Every fine-tuning with ChatML adds its markers like this; the rest of the rows is padding, or there is none."""
    train_sentence_piece(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": NUM_PIECES, "<|im_start|>": NUM_PIECES + 1}))
    files = tmp_path / "files"
    files.mkdir()
    for name in ("tokenizer.model", "added_tokens.json"):
        shutil.move(tmp_path / name, files)
    llama, clip = save_parts(tmp_path, files, rows=rows)
    model = import_parts(llama, clip, tmp_path / "run", ImportOptions())
    assert model.language.vocab_size == NUM_PIECES + 2

    theirs = load_file(llama / "model.safetensors")["model.embed_tokens.weight"]
    ours = read_tensor(read_run_settings(tmp_path / "run").checkpoint, EMBEDDING)
    assert torch.equal(ours[: NUM_PIECES + 2], theirs[: NUM_PIECES + 2])
    assert load_tokenizer(tmp_path / "run").piece_id("<|im_end|>") == NUM_PIECES


def test_a_padding_token_without_a_row_is_no_token_of_the_model(tmp_path):
    """Llama-2-7b-hf of NousResearch: 32,000 rows, and a padding token with the id 32000."""
    files = tmp_path / "files"
    files.mkdir()
    train_sentence_piece(files)
    (files / "added_tokens.json").write_text(json.dumps({"<pad>": NUM_PIECES}))
    (files / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    llama, clip = save_parts(tmp_path, files, rows=NUM_PIECES)
    assert import_parts(llama, clip, tmp_path / "run", ImportOptions()).language.vocab_size == NUM_PIECES


def test_a_folder_with_nothing_but_a_tokenizer_json_is_read(tmp_path):
    files = write_llama_3(tmp_path / "files")
    size = load_tokenizer(files).vocab_size
    llama, clip = save_parts(tmp_path, files, rows=size + 1)  # VILA-1.5 with Llama 3 has a row for padding
    assert import_parts(llama, clip, tmp_path / "run", ImportOptions()).language.vocab_size == size
    assert load_tokenizer(read_run_settings(tmp_path / "run").tokenizer).sha256 == load_tokenizer(files).sha256


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path):
    files = write_llama_3(tmp_path / "files")
    llama, clip = save_parts(tmp_path, files, rows=300)
    with pytest.raises(CheckpointError, match="tokenizer has 407 pieces, the embedding 300 rows"):
        import_parts(llama, clip, tmp_path / "run", ImportOptions())


def test_an_image_token_among_the_others_makes_way(exported, model_config, tmp_path):
    """Tokens behind those of image and padding: the model gets an image token behind all of them."""
    folder = tmp_path / "llava"
    shutil.copytree(exported, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    config["added_tokens_decoder"][str(NUM_PIECES + 2)] = {"content": "<|im_end|>", **flags}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = import_model(folder, tmp_path / "run")
    assert model.language.vocab_size == NUM_PIECES + 3
    ours = read_tensor(read_run_settings(tmp_path / "run").checkpoint, EMBEDDING)

    theirs = load_file(folder / "model.safetensors")["language_model.model.embed_tokens.weight"]
    assert torch.equal(ours[:NUM_PIECES], theirs[:NUM_PIECES])
