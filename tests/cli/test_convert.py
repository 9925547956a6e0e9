import dataclasses
import json
import shutil

import pytest
import yaml

from megatron_vlm.cli.main import main
from megatron_vlm.config import ModelConfig, load_section
from megatron_vlm.config.adapters.lora import Config
from tests.support.configs import tiny_model
from tests.support.random_run import write_random_adapter, write_random_run
from tests.support.sentence_piece import NUM_PIECES, train_sentence_piece

MODEL = tiny_model(vocab_size=NUM_PIECES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    write_random_run(folder / "run", MODEL, train_sentence_piece(folder))
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run):
    output = run.parent / "exported"
    assert main(["convert", "to-hf", str(run), "--format", "llava", "--output", str(output)]) == 0
    return output


def test_to_hf_says_what_it_wrote(run, tmp_path, capsys):
    assert main(["convert", "to-hf", str(run / "checkpoints" / "iter_0000000"), "--output", str(tmp_path / "x")]) == 0
    assert "for LlavaForConditionalGeneration.from_pretrained" in capsys.readouterr().out


def test_to_hf_refuses_an_existing_folder(run, exported, capsys):
    assert main(["convert", "to-hf", str(run), "--output", str(exported)]) == 64
    assert capsys.readouterr().err.startswith("megatron-vlm: error: folder")


def test_to_hf_without_a_checkpoint_is_one_line(tmp_path, capsys):
    assert main(["convert", "to-hf", str(tmp_path), "--output", str(tmp_path / "x")]) == 65
    assert "no complete checkpoint found" in capsys.readouterr().err


def test_to_hf_without_a_tokenizer_names_the_option(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "checkpoints" / "iter_0000000" / "config.yaml"
    config.write_text(config.read_text().replace("tokenizer.model", "gone.model"))
    assert main(["convert", "to-hf", str(tmp_path / "run"), "--output", str(tmp_path / "x")]) == 78
    assert "gone.model does not exist" in (error := capsys.readouterr().err)
    assert "name it with --tokenizer" in error


def test_to_hf_quantises(run, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Is the blue circle left of 3 red squares? Yes. " * 150)
    command = ["convert", "to-hf", str(run), "--output", str(tmp_path / "x"), "--quantize", "awq", "--group-size", "64"]
    assert main([*command, "--calibration", str(tmp_path / "text.txt")]) == 0
    assert "for LlavaForConditionalGeneration.from_pretrained" in capsys.readouterr().out
    settings = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["group_size"]) == ("awq", 64)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--quantize", "awq"], 64, "--quantize awq needs a text; fix: name a file with --calibration"),
        (["--calibration", "gone.txt"], 64, "--calibration says how to quantise; fix: add --quantize awq"),
        (["--group-size", "64"], 64, "--group-size says how to quantise"),
        (
            ["--quantize", "awq", "--calibration", "gone.txt", "--verify"],
            64,
            "--verify is for weights that are not qua",
        ),
        (["--quantize", "awq", "--calibration", "gone.txt", "--format", "peft"], 64, "--format peft is for weights"),
        (["--quantize", "gptq", "--calibration", "gone.txt"], 64, "unknown method of quantisation 'gptq'"),
        (["--quantize", "awq", "--calibration", "gone.txt"], 64, "has 64 inputs, not a multiple of the group size 128"),
        (
            ["--quantize", "awq", "--calibration", "gone.txt", "--group-size", "32"],
            65,
            "calibration text cannot be read",
        ),
    ],
)
def test_to_hf_says_in_one_line_why_it_cannot_quantise(options, code, message, run, tmp_path, capsys):
    assert main(["convert", "to-hf", str(run), "--output", str(tmp_path / "x"), *options]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_from_hf_prints_the_model_section_for_a_config(run, exported, tmp_path, capsys):
    assert main(["convert", "from-hf", "--llava", str(exported), "--output", str(tmp_path / "run")]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(printed))
    model = load_section(ModelConfig, tmp_path / "config.yaml", "model")
    assert model.language.padded_vocab_size == MODEL.language.padded_vocab_size
    assert (model.vision.num_layers, model.vision.feature_layer) == (MODEL.vision.num_layers_run, -1)


def test_what_lora_learned_goes_to_a_peft_folder_and_comes_back(run, tmp_path, capsys):
    model = dataclasses.replace(MODEL, adapter=Config(rank=2))
    write_random_adapter(tmp_path / "adapted", run, model, run.parent / "tokenizer.model")
    assert (
        main(["convert", "to-hf", str(tmp_path / "adapted"), "--format", "peft", "--output", str(tmp_path / "x")]) == 0
    )
    assert "for PeftModel.from_pretrained" in capsys.readouterr().out
    command = ["convert", "from-hf", "--peft", str(tmp_path / "x"), "--base", str(run)]
    assert main([*command, "--output", str(tmp_path / "back")]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["adapter"]["ranks"] == {"linear_fc1": 4, "linear_qkv": 6}
    assert main(["checkpoint", "verify", str(tmp_path / "back")]) == 0


def test_from_hf_checks_a_given_config(run, exported, tmp_path, capsys):
    arguments = ["convert", "from-hf", "--llava", str(exported), "--output", str(tmp_path / "run"), "--config"]
    assert main([*arguments, str(run / "config.yaml")]) == 65
    assert "model.vision.num_layers=3, the folder has 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "parts",
    [[], ["--language", "a"], ["--llava", "a", "--language", "b"], ["--peft", "a"], ["--llava", "a", "--base", "b"]],
)
def test_from_hf_needs_both_parts_or_a_llava(parts, tmp_path, capsys):
    assert main(["convert", "from-hf", *parts, "--output", str(tmp_path / "run")]) == 64
    assert "needs --language and --vision, or --model with or without --vision" in capsys.readouterr().err
