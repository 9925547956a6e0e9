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
