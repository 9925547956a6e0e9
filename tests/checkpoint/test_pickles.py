import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint import metadata

from megatron_vlm.checkpoint.pickles import METADATA_NAME, check_metadata
from megatron_vlm.checkpoint.tensors import list_tensors, read_tensor, write_weights
from megatron_vlm.config import CheckpointError
from tests.support.hostile import touching


@pytest.fixture
def checkpoint(tmp_path):
    return write_weights(tmp_path, {"model.weight": torch.arange(6.0)}, {})


def change_index(checkpoint, change):
    """Pickle the index anew, as torch does, after `change` was called with it."""
    index = pickle.loads((checkpoint / METADATA_NAME).read_bytes())
    change(index)
    (checkpoint / METADATA_NAME).write_bytes(pickle.dumps(index))


def test_an_index_of_torch_passes(checkpoint):
    check_metadata(checkpoint)
    index = pickle.loads((checkpoint / METADATA_NAME).read_bytes())
    assert list(index.state_dict_metadata) == ["model.weight"]


def test_an_index_that_would_run_code_is_refused_and_not_run(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(touching(tmp_path / "ran")))
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


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "common.pt"])
def test_a_folder_in_place_of_a_file_is_named_as_a_missing_file(checkpoint, name):
    (checkpoint / name).unlink()
    (checkpoint / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"(no tensor index|is missing) .*{name}.*use a complete checkpoint"):
        check_metadata(checkpoint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "does not name the format torch_dist"),
        (b"[" * 100_000, "does not name the format torch_dist"),
        (b"{}", "does not name the format torch_dist"),
        (b'{"sharded_backend": "zarr", "common_backend": "torch"}', "does not name the format torch_dist"),
    ],
)
def test_a_format_that_is_not_ours_is_refused(checkpoint, content, message):
    (checkpoint / "metadata.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        check_metadata(checkpoint)


def test_a_common_state_that_would_run_code_is_refused_and_not_run(checkpoint, tmp_path):
    for content in (b"", b"no pickle", pickle.dumps(touching(tmp_path / "ran"))):
        (checkpoint / "common.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"common state is damaged or hostile: .*common.pt"):
            check_metadata(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_a_value_outside_of_the_folder_or_of_its_file_is_refused(checkpoint, tmp_path):
    def move(index):
        (place,) = index.storage_data.values()
        place.relative_path = "../../outside.distcp"

    def lengthen(index):
        (place,) = index.storage_data.values()
        place.length += 1

    original = (checkpoint / METADATA_NAME).read_bytes()
    (tmp_path / "outside.distcp").write_bytes(bytes(1 << 20))
    for change, message in ((move, "which is not in the folder"), (lengthen, "it names bytes 0 to")):
        (checkpoint / METADATA_NAME).write_bytes(original)
        change_index(checkpoint, change)
        with pytest.raises(CheckpointError, match=message):
            check_metadata(checkpoint)


def test_an_object_that_would_run_code_is_refused_and_not_run(checkpoint, tmp_path):
    """torch unpickles what is no tensor without restrictions."""
    stream = io.BytesIO()
    torch.save(touching(tmp_path / "ran"), stream)

    def add(index, key="model.norm._extra_state/shard_0_1"):
        index.state_dict_metadata[key] = metadata.BytesStorageMetadata()
        (place,) = index.storage_data.values()
        index.storage_data[metadata.MetadataIndex(key)] = type(place)("object.distcp", 0, len(stream.getvalue()))

    (checkpoint / "object.distcp").write_bytes(stream.getvalue())
    change_index(checkpoint, add)
    with pytest.raises(CheckpointError, match=r"extra state of a module is damaged or hostile: .*object.distcp"):
        check_metadata(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_a_weight_that_claims_to_be_an_object_is_refused(checkpoint):
    def disguise(index):
        index.state_dict_metadata["model.weight"] = metadata.BytesStorageMetadata()

    change_index(checkpoint, disguise)
    with pytest.raises(CheckpointError, match="it has a BytesStorageMetadata for model.weight"):
        check_metadata(checkpoint)


def test_written_weights_are_read_back_whole(tmp_path):
    tensors = {"model.a": torch.randn(4, 3), "model.b": torch.randn(2).bfloat16()}
    checkpoint = write_weights(tmp_path, tensors, {})
    assert list_tensors(checkpoint) == {"model.a": ((4, 3), torch.float32), "model.b": ((2,), torch.bfloat16)}
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(checkpoint, name), tensor)
