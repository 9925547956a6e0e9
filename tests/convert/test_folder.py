import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_vlm.config import CheckpointError, StorageError
from megatron_vlm.convert.folder import HFFolder, Planned, WeightsWriter

PLAN = [Planned("a", (2, 3), torch.float32), Planned("b", (4,), torch.bfloat16)]
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def writer(tmp_path):
    return WeightsWriter(tmp_path, PLAN, 10**6)


def test_what_is_written_reads_back(writer, tmp_path):
    writer.write(TENSORS.items())
    writer.verify()
    (tmp_path / "config.json").write_text("{}")
    folder = HFFolder(tmp_path)
    assert all(torch.equal(folder.read(name), tensor) for name, tensor in TENSORS.items())


def test_verify_finds_other_values(writer, tmp_path):
    writer.write(TENSORS.items())
    save_file({**TENSORS, "a": TENSORS["a"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tensor a has other values than were written"):
        writer.verify()


def test_verify_finds_a_missing_tensor(writer, tmp_path):
    writer.write(TENSORS.items())
    save_file({"a": TENSORS["a"]}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="1 tensors in the files, 2 written"):
        writer.verify()


def test_verify_finds_a_file_that_was_cut(writer, tmp_path):
    writer.write(TENSORS.items())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        writer.verify()


def test_a_tensor_that_is_not_as_planned_is_refused(writer):
    with pytest.raises(CheckpointError, match=r"tensor a is \[3\] torch.float32, planned \[2, 3\] torch.float32"):
        writer.write([("a", torch.zeros(3))])


def test_a_tensor_that_does_not_come_is_missed(writer):
    with pytest.raises(CheckpointError, match="1 tensors were not written, first b"):
        writer.write([("a", TENSORS["a"])])


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(StorageError, match="weights not written"):
        WeightsWriter(tmp_path / "none", PLAN, 10**6).write(TENSORS.items())


def test_others_may_read_the_files(writer, tmp_path):
    tmp_path.chmod(0o755)
    writer.write(TENSORS.items())
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"file is missing \(.*config.json\)"),
        ({"config.json": "{"}, "file cannot be read"),
        ({"config.json": "[]"}, "file holds no JSON object"),
        ({"config.json": "{}"}, "no model.safetensors and no pytorch_model.bin"),
        ({"config.json": "{}", "model.safetensors": "x"}, "weights cannot be read"),
        ({"config.json": "{}", "pytorch_model.bin": "x"}, "weights cannot be read"),
        (
            {
                "config.json": "{}",
                "model.safetensors.index.json": json.dumps({"weight_map": {"a": "../x.safetensors"}}),
            },
            "file ../x.safetensors is missing",
        ),
    ],
)
def test_a_folder_that_is_not_whole_is_one_line(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        HFFolder(tmp_path)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (print, ("this must never be printed",))

    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": Hostile()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        HFFolder(tmp_path)


def test_a_type_that_torch_cannot_hold_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"a tensor has the type F8_E8M0 .*that is not quantised"):
        HFFolder(tmp_path)
