import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_vlm.config import CheckpointError
from megatron_vlm.convert.folder import HFFolder, read_json, read_settings

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def save_as_old_torch(tensors, path):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("file", "save"),
    [
        ("model.safetensors", save_file),
        ("pytorch_model.bin", torch.save),
        ("pytorch_model.bin", save_as_old_torch),
    ],
)
def test_tensors_are_listed_and_read(tmp_path, file, save):
    save(TENSORS, tmp_path / file)
    folder = HFFolder(tmp_path)
    assert {name: (stored.shape, stored.dtype) for name, stored in folder.stored.items()} == {
        "a": ((2, 3), torch.float32),
        "b": ((4,), torch.bfloat16),
    }
    assert all(torch.equal(folder.read(name), tensor) for name, tensor in TENSORS.items())


def test_parts_have_their_prefix_and_the_later_one_counts(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        save_file({"a": torch.full((2,), float(len(name)))}, tmp_path / name / "model.safetensors")
    parts = {"llm/": tmp_path / "first", "tower/": tmp_path / "second", "": tmp_path / "first"}
    folder = HFFolder(tmp_path, [("tower/a", "a")], parts)
    assert sorted(folder.stored) == ["a", "llm/a"]
    assert folder.read("llm/a")[0] == folder.read("a")[0] == len("first")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"file is missing \(.*config.json\)"),
        ("{", "file cannot be read"),
        ("[]", "file holds no JSON object"),
    ],
)
def test_settings_that_cannot_be_read_are_one_line(text, message, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no model.safetensors and no pytorch_model.bin"),
        ({"model.safetensors": "x"}, "weights cannot be read"),
        ({"pytorch_model.bin": "x"}, "weights cannot be read"),
        (
            {"model.safetensors.index.json": json.dumps({"weight_map": {"a": "../x.safetensors"}})},
            "1 of 1 files that the index names are missing, first x.safetensors",
        ),
        ({"pytorch_model.bin.index.json": "{}"}, "index names no files"),
    ],
)
def test_a_folder_that_is_not_whole_is_one_line(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        HFFolder(tmp_path)


def test_a_complete_kind_of_weights_goes_before_one_that_is_not(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    folder = HFFolder(tmp_path)
    assert folder.missing == []
    assert folder.read("a").tolist() == [1, 1]


def test_files_that_an_index_names_without_need_may_be_missing(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "there.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "there.safetensors", "b": "x"}})
    )
    folder = HFFolder(tmp_path)
    assert [path.name for path in folder.missing] == ["x"]
    assert list(folder.stored) == ["a"]


def test_nulls_stand_for_defaults(tmp_path):
    (tmp_path / "config.json").write_text('{"a": null, "text_config": {"b": null, "c": 0}, "d": [null]}')
    assert read_settings(tmp_path / "config.json") == {"text_config": {"c": 0}, "d": [None]}


def test_files_that_an_index_does_not_name_are_left_alone(tmp_path):
    """A folder that was saved twice, the second time in fewer files."""
    save_file(TENSORS, tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model-00002-of-00003.safetensors").write_text("cut off")
    index = {"weight_map": dict.fromkeys(TENSORS, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(HFFolder(tmp_path).stored) == set(TENSORS)


@pytest.mark.parametrize("old", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, old):
    class Hostile:
        def __reduce__(self):
            return (print, ("this must never be printed",))

    torch.save({"a": Hostile()}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        HFFolder(tmp_path)


def test_a_type_that_torch_cannot_hold_is_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"a tensor has the unsupported type F8_E8M0 .*that is not quantised"):
        HFFolder(tmp_path)
