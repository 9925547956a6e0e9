import json

import pytest

from megatron_vlm.checkpoint.manifest import (
    Manifest,
    checksum_file,
    find_faults,
    find_strangers,
    list_files,
    read_manifest,
    write_manifest,
)
from megatron_vlm.config import CheckpointError
from megatron_vlm.platform.files.durable import UNFINISHED
from tests.support.runs import write_shards


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 64)
    (tmp_path / "b.bin").write_bytes(b"second")
    files = {name: checksum_file(tmp_path / name) for name in list_files(tmp_path)}
    write_manifest(tmp_path, Manifest(iteration=7, progress={"iteration": 7}, files=files))
    return tmp_path


def faults(folder):
    manifest = read_manifest(folder)
    return find_faults(folder, sorted(manifest.files), manifest)


def test_an_untouched_checkpoint_has_no_fault(checkpoint):
    assert read_manifest(checkpoint).iteration == 7
    assert faults(checkpoint) == []


def test_a_flipped_bit_is_found(checkpoint):
    content = bytearray((checkpoint / "a.bin").read_bytes())
    content[5000] ^= 1
    (checkpoint / "a.bin").write_bytes(content)
    assert faults(checkpoint) == ["a.bin has the wrong checksum"]


def test_a_truncated_file_is_found(checkpoint):
    (checkpoint / "a.bin").write_bytes(b"short")
    assert faults(checkpoint) == ["a.bin has 5 bytes, not 16384"]


def test_a_missing_file_is_found(checkpoint):
    (checkpoint / "b.bin").unlink()
    assert faults(checkpoint) == ["b.bin is missing"]


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="has no manifest.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}'])
def test_a_damaged_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        read_manifest(tmp_path)


def test_a_dataset_is_named_as_such(tmp_path):
    write_shards(tmp_path)
    with pytest.raises(CheckpointError, match=r"folder is a dataset, not a checkpoint .*fix: name a run folder"):
        read_manifest(tmp_path / "coyo")


def test_a_newer_version_is_refused(checkpoint):
    record = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps({**record, "format_version": 3}))
    with pytest.raises(CheckpointError, match="format version 3, this program reads 1 and 2"):
        read_manifest(checkpoint)


def test_a_manifest_without_a_checksum_of_itself_is_read(checkpoint):
    record = json.loads((checkpoint / "manifest.json").read_text())
    del record["crc32"]
    (checkpoint / "manifest.json").write_text(json.dumps({**record, "format_version": 1}))
    assert read_manifest(checkpoint).progress == {"iteration": 7}


def test_every_flipped_bit_of_the_manifest_is_found_or_changes_nothing(checkpoint):
    path = checkpoint / "manifest.json"
    content, whole = path.read_bytes(), read_manifest(checkpoint)
    for position in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            found = read_manifest(checkpoint)
        except CheckpointError:
            continue
        assert found == whole


@pytest.mark.parametrize(
    ("folder", "progress"), [("iter_0000008", 7), ("iter_0000007", 8), (f"iter_0000008{UNFINISHED}", 7)]
)
def test_folder_manifest_and_progress_have_one_iteration(tmp_path, folder, progress):
    path = tmp_path / folder
    path.mkdir()
    write_manifest(path, Manifest(iteration=7, progress={"iteration": progress}, files={}))
    with pytest.raises(CheckpointError, match=r"iterations differ: manifest.json 7, progress \d, folder \d"):
        read_manifest(path)


def test_a_file_that_the_manifest_lacks_is_found(checkpoint):
    (checkpoint / "c.bin").write_bytes(b"third")
    (checkpoint / ".nfs0001").write_bytes(b"removed, but open")
    assert find_strangers(checkpoint, read_manifest(checkpoint)) == ["c.bin is not in the manifest"]
