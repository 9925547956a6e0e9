import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.config import CheckpointError
from megatron_vlm.convert.folder import DTYPES
from megatron_vlm.convert.weights_writer import Announced, WeightsWriter

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(4), 'caf\u00e9 "x"': torch.randn(3, 5).t()}


def announce(tensors):
    return [Announced(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


@pytest.fixture
def writer(tmp_path):
    return WeightsWriter(tmp_path, announce(TENSORS), 10**6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_file_is_the_one_that_safetensors_writes(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in TENSORS.items()}
    WeightsWriter(tmp_path, announce(tensors), 10**6).write(tensors.items())
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_several_files_have_an_index(tmp_path):
    writer = WeightsWriter(tmp_path, announce(TENSORS), 50)
    writer.write(TENSORS.items())
    writer.verify()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert index["weight_map"] == dict(zip(TENSORS, [files[0], files[0], files[1]], strict=True))
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in TENSORS.values())}
    found = load_file(tmp_path / files[0]) | load_file(tmp_path / files[1])
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_a_file_with_several_types_is_the_one_that_safetensors_writes(tmp_path):
    tensors = {f"{name}.{first}": torch.ones(3).to(dtype) for name, dtype in DTYPES.items() for first in "ba"}
    WeightsWriter(tmp_path, announce(tensors), 10**6).write(tensors.items())
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_sub_folder_has_files_and_an_index_of_its_own(tmp_path):
    tensors = {f"{folder}{name}": tensor for name, tensor in TENSORS.items() for folder in ("", "llm/", "mm/")}
    several = {name: tensor for name, tensor in tensors.items() if name != "mm/b"}
    writer = WeightsWriter(tmp_path, announce(several), 50)
    writer.write(several.items())
    writer.verify()
    for folder in (tmp_path, tmp_path / "llm"):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert list(index["weight_map"]) == list(TENSORS)
        assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in TENSORS.values())}
        for name, file in index["weight_map"].items():
            assert torch.equal(load_file(folder / file)[name], TENSORS[name])
    found = {path.name for path in (tmp_path / "mm").iterdir()}
    assert "model-00002-of-00002.safetensors" in found


def test_tensors_are_not_kept(tmp_path):
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = []

    def make():
        for number in range(9):
            tensor = torch.full((32,), float(number))
            alive.add(tensor)
            most.append(len(alive))
            yield f"t{number}", tensor
            del tensor

    WeightsWriter(tmp_path, [Announced(f"t{number}", (32,), torch.float32) for number in range(9)], 10**6).write(make())
    assert max(most) <= 2  # the next one is made while the last one goes


def test_verify_finds_other_values(writer, tmp_path):
    writer.write(TENSORS.items())
    writer.verify()
    changed = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file({**changed, "a": TENSORS["a"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tensor a reads back with other values"):
        writer.verify()


def test_verify_finds_a_missing_tensor(writer, tmp_path):
    writer.write(TENSORS.items())
    save_file({"a": TENSORS["a"]}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="1 tensors in the files, 3 written"):
        writer.verify()


def test_verify_finds_a_file_that_was_cut(writer, tmp_path):
    writer.write(TENSORS.items())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        writer.verify()


def test_a_tensor_that_is_not_as_announced_is_refused(writer):
    with pytest.raises(CheckpointError, match=r"tensor a is \[3\] torch.float32, announced as \[4\] torch.float32"):
        writer.write([("a", torch.zeros(3))])


def test_a_tensor_that_does_not_come_is_missed(writer):
    with pytest.raises(CheckpointError, match="2 tensors were not written, first b"):
        writer.write([("a", TENSORS["a"])])


def test_others_may_read_the_files(writer, tmp_path):
    writer.write(TENSORS.items())
    (tmp_path / "other").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
