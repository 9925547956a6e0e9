import os
import pickle

import pytest
import torch

from megatron_vlm.checkpoint.pickles import METADATA_NAME, check_metadata
from megatron_vlm.checkpoint.tensors import list_tensors, read_tensor, write_weights
from megatron_vlm.config import CheckpointError


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_an_index_of_torch_passes(tmp_path):
    checkpoint = write_weights(tmp_path, {"model.weight": torch.arange(6.0)}, {})
    check_metadata(checkpoint)
    index = pickle.loads((checkpoint / METADATA_NAME).read_bytes())
    assert list(index.state_dict_metadata) == ["model.weight"]


def test_an_index_that_would_run_code_is_refused_and_not_run(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="damaged or hostile: it names posix.system"):
        check_metadata(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2])[:-1]])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or hostile"):
        check_metadata(tmp_path)


def test_a_missing_index_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no tensor index"):
        check_metadata(tmp_path)


def test_written_weights_are_read_back_whole(tmp_path):
    tensors = {"model.a": torch.randn(4, 3), "model.b": torch.randn(2).bfloat16()}
    checkpoint = write_weights(tmp_path, tensors, {})
    assert list_tensors(checkpoint) == {"model.a": ((4, 3), torch.float32), "model.b": ((2,), torch.bfloat16)}
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(checkpoint, name), tensor)
