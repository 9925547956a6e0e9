"""Folders that cannot be imported are told apart in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.cli.main import main
from megatron_vlm.config import CheckpointError
from megatron_vlm.convert.folder import HFFolder
from megatron_vlm.convert.from_hf import import_model


@pytest.mark.parametrize(
    ("file", "message", "fix"),
    [
        ("model-Q4_K_M.gguf", "a model of llama.cpp", "that it was made from"),
        ("adapter_config.json", "a LoRA of PEFT", "name it with --peft"),
        ("checkpoints/iter_0000010/manifest.json", "a run of this program", "checkpoint.load_weights"),
        ("common.pt", "a checkpoint of this program", "checkpoint.load_weights"),
        ("consolidated.00.pth", "in the layout of its makers", "Hugging Face's layout"),
    ],
)
def test_a_folder_of_another_kind_is_named(file, message, fix, tmp_path):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    with pytest.raises(CheckpointError, match=rf"the folder holds .*{message}.*fix: .*{fix}"):
        import_model(tmp_path, tmp_path / "run")


def test_a_file_in_place_of_its_folder_is_named(tmp_path):
    (tmp_path / "model.gguf").write_text("x")
    with pytest.raises(CheckpointError, match=rf"path is a file .*fix: name its folder, {tmp_path}$"):
        import_model(tmp_path / "model.gguf", tmp_path / "run")


def test_a_folder_for_tinychat_is_refused_in_one_line(tmp_path, exported, capsys):
    folder = shutil.copytree(exported, tmp_path / "tinychat")
    (folder / "model.safetensors").rename(folder / "llm-w4-g128-awq-v2.pt")
    assert main(["convert", "from-hf", "--model", str(folder), "--output", str(tmp_path / "run")]) == 65
    (line,) = capsys.readouterr().err.splitlines()
    assert "a model that is quantised for TinyChat (llm-w4-g128-awq-v2.pt)" in line
    assert "use the folder of the model that it was made from" in line


def test_quantised_tensors_are_found_where_the_settings_say_nothing(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "gptq")
    tensors = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.0.mlp.down_proj"
    del tensors[f"{name}.weight"]
    tensors[f"{name}.qweight"] = torch.zeros(2, 2, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"the weights are quantised \(tensor {name}.qweight\)"):
        import_model(folder, tmp_path / "run")


def test_tensors_in_files_that_are_missing_are_put_down_to_them(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "part")
    names = HFFolder(folder).stored
    (folder / "model.safetensors").rename(folder / "there.safetensors")
    files = dict.fromkeys(names, "there.safetensors") | {"more": "gone.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    import_model(folder, tmp_path / "run")
    tensors = load_file(folder / "there.safetensors")
    del tensors["multi_modal_projector.linear_1.bias"]
    save_file(tensors, folder / "there.safetensors")
    with pytest.raises(CheckpointError, match=r"1 files that the index names are missing, first gone.safetensors"):
        import_model(folder, tmp_path / "again")
