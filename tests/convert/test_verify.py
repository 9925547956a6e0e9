"""Two models are told to be the same only where their tensors and what they compute are."""

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.cli.main import main
from megatron_vlm.config import CheckpointError
from megatron_vlm.convert.compare_logits import MIN_POSITIONS
from megatron_vlm.convert.from_hf import import_model
from megatron_vlm.convert.to_hf import ExportOptions, export_model
from megatron_vlm.convert.verify import MAX_KL, verify_models

WEIGHTS = "model.safetensors"


@pytest.fixture
def changed(exported, tmp_path):
    """Return a copy of the exported folder with other tensors: changed({name: function of the tensor})."""

    def change(changes):
        folder = tmp_path / "changed"
        shutil.copytree(exported, folder)
        tensors = load_file(folder / WEIGHTS)
        tensors |= {name: edit(tensors[name]) for name, edit in changes.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    return change


def test_a_checkpoint_and_its_export_are_the_same_model(make_run, model_config, exported):
    found = verify_models(make_run(model_config), exported)
    assert (found.weights.num_equal, found.weights.rounded) == (found.weights.num_tensors, False)
    assert found.weights.faults == ()
    assert found.logits.num_positions >= MIN_POSITIONS
    assert found.logits.num_images >= 6
    assert found.logits.mean_kl <= 1e-9  # far below what is accepted; logits of these models have a spread of 0.3
    assert found.logits.top_1 == 1
    found.check(make_run(model_config), exported)


def test_a_folder_and_what_was_imported_from_it_are_the_same_model(exported, tmp_path):
    import_model(exported, tmp_path / "run")
    assert verify_models(exported, tmp_path / "run", with_logits=False).weights.faults == ()


def test_two_checkpoints_are_compared_by_our_own_model(make_run, model_config):
    run = make_run(model_config)
    assert verify_models(run, run).logits.max_difference == 0


def test_one_changed_value_is_found_and_named(make_run, model_config, changed):
    def nudge(tensor):
        tensor = tensor.clone()
        tensor.flatten()[3] += 0.25
        return tensor

    name = "language_model.model.layers.1.mlp.down_proj.weight"
    folder = changed({name: nudge})
    found = verify_models(make_run(model_config), folder)
    assert found.logits is None
    assert found.weights.num_equal == found.weights.num_tensors - 1
    with pytest.raises(CheckpointError, match=r"1 tensors differ: .*linear_fc2.weight\[1\] by up to 0.25"):
        found.check(make_run(model_config), folder)


def test_a_coarser_type_is_compared_after_rounding(make_run, model_config, tmp_path):
    run = make_run(model_config)
    export_model(read_run_settings(run), tmp_path / "hf", ExportOptions(dtype="bfloat16"))
    found = verify_models(run, tmp_path / "hf")
    assert found.weights.rounded
    assert found.weights.faults == ()
    assert MAX_KL < found.logits.max_kl < found.max_kl
    assert any("after rounding" in line for line in found.lines)


def test_logits_that_differ_by_more_than_rounding_are_refused(make_run, model_config, exported):
    found = verify_models(make_run(model_config), exported)
    worse = replace(found, logits=replace(found.logits, mean_kl=float("nan")))
    with pytest.raises(CheckpointError, match="logits differ: KL nan, at most 1e-06"):
        worse.check(exported, exported)


def test_a_folder_with_another_tokenizer_is_refused(make_run, model_config, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["model"]["merges"] = tree["model"]["merges"][20:]
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    found = verify_models(make_run(model_config), folder, with_logits=False)
    with pytest.raises(CheckpointError, match=r"tokenizer.json differs from tokenizer.model: the text"):
        found.check(make_run(model_config), folder)


def test_the_command_line_verifies_two_models_and_an_export(make_run, model_config, changed, tmp_path, capsys):
    run = str(make_run(model_config))
    assert main(["convert", "to-hf", run, "--output", str(tmp_path / "hf"), "--verify"]) == 0
    figures = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(("tensors:", "tokenizers:", "logits:"))
    ]
    assert "equal to the bit" in figures[0]
    assert all(f"- {line}\n" in (tmp_path / "hf" / "README.md").read_text() for line in figures)
    folder = changed({"multi_modal_projector.linear_1.bias": lambda tensor: tensor + 1})
    assert main(["convert", "verify", run, str(folder), "--no-logits"]) == 65
    captured = capsys.readouterr()
    assert "logits: not compared, as asked" in captured.out
    assert "1 tensors differ" in captured.err
