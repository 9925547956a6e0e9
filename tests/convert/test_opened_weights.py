import shutil

import pytest

from megatron_vlm.config import CheckpointError
from megatron_vlm.convert.opened_weights import open_weights


def test_a_folder_and_a_checkpoint_have_the_same_keys_and_shapes(make_run, model_config, exported):
    run, folder = open_weights(make_run(model_config)), open_weights(exported)
    assert {key: tensor.shape for key, tensor in run.tensors.items()} == {
        key: tensor.shape for key, tensor in folder.tensors.items()
    }
    assert (run.settings is None, folder.settings) == (False, None)


def test_a_damaged_checkpoint_is_refused(make_run, model_config, tmp_path):
    shutil.copytree(make_run(model_config), tmp_path / "run")
    (payload, *_) = sorted((tmp_path / "run" / "checkpoints").glob("*/*.distcp"))
    damaged = bytearray(payload.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    payload.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=payload.name):
        open_weights(tmp_path / "run")


def test_a_folder_of_another_kind_is_named(tmp_path):
    (tmp_path / "model-F16.gguf").write_text("x")
    with pytest.raises(CheckpointError, match=r"the folder holds a model of llama.cpp \(model-F16.gguf\)"):
        open_weights(tmp_path)


def test_a_run_without_a_checkpoint_is_not_called_another_kind(tmp_path):
    (tmp_path / "checkpoints" / "iter_0000010").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        open_weights(tmp_path)
