import dataclasses
import json
import zlib

import numpy as np
import pytest

from megatron_vlm.config import DataError
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment
from megatron_vlm.data.shards.manifest import MANIFEST_FILE, FileFacts, load_manifest, save_manifest
from megatron_vlm.data.shards.verify import verify_dataset
from megatron_vlm.data.shards.writer import ShardWriter, write_dataset


@pytest.fixture
def dataset(folder, make_samples, tokenizer_facts):
    write_dataset(folder, make_samples(12), dataset_name="tiny", tokenizer=tokenizer_facts, samples_per_shard=6)
    return folder


def faults(folder, **options) -> list[str]:
    return list(verify_dataset(folder, **options))


def flip(path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_whole_dataset_has_no_fault(dataset):
    assert faults(dataset) == faults(dataset, decode=True) == []


@pytest.mark.parametrize("suffix", ["bin", "idx", "crc", "dim"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.7, 0.999])
def test_flipped_bit_of_any_file_is_found(dataset, suffix, fraction):
    path = dataset / f"00001.{suffix}"
    flip(path, int(path.stat().st_size * fraction))
    found = faults(dataset)
    assert found
    assert all(fault.startswith("00001.") for fault in found)


def test_flipped_bit_of_the_data_names_sample_and_sequence(dataset):
    flip(dataset / "00000.bin", 0)
    assert faults(dataset) == [
        "00000.bin: sample 0, sequence 0: checksum differs",
        "00000.bin: checksum differs from the manifest",
    ]


@pytest.mark.parametrize("suffix", ["bin", "idx", "crc", "dim"])
def test_truncated_and_missing_files_are_found(dataset, suffix):
    path = dataset / f"00000.{suffix}"
    path.write_bytes(path.read_bytes()[:-3])
    assert any(f"00000.{suffix}:" in fault and "the manifest says" in fault for fault in faults(dataset))
    path.unlink()
    assert f"00000.{suffix}: file is missing" in faults(dataset)


def test_damage_of_data_and_index_is_found_at_once(dataset):
    flip(dataset / "00000.idx", 40)
    flip(dataset / "00000.crc", 0)
    flip(dataset / "00000.bin", 0)
    wanted = [f"00000.{suffix}: checksum differs from the manifest" for suffix in ("idx", "crc", "bin")]
    assert faults(dataset) == wanted


def test_hole_of_zeros_is_found(dataset):
    path = dataset / "00000.bin"
    content = bytearray(path.read_bytes())
    content[500:1000] = bytes(500)
    path.write_bytes(content)
    assert any("checksum differs" in fault for fault in faults(dataset))


def test_swapped_shards_are_found(dataset):
    for suffix in ("bin", "idx", "crc", "dim"):
        one, other = dataset / f"00000.{suffix}", dataset / f"00001.{suffix}"
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
    assert faults(dataset)


def test_file_that_is_not_in_the_manifest_is_found(dataset):
    (dataset / "00002.bin").write_bytes(b"x")
    assert faults(dataset) == ["00002.bin: file is not in the manifest"]


def write_bad(folder, sample, tokenizer_facts):
    write_dataset(folder, [sample], dataset_name="tiny", tokenizer=tokenizer_facts)
    return faults(folder)


@pytest.mark.parametrize("ids", [[1, 512], [-1], [2**31 - 1]])
def test_token_outside_of_the_vocabulary_is_found(folder, tokenizer_facts, ids):
    sample = EncodedSample((TextSegment(np.array(ids, dtype=np.int32), True),))
    (fault,) = write_bad(folder, sample, tokenizer_facts)
    assert "are outside 0 to 511" in fault


def test_image_that_is_no_image_is_found(folder, tokenizer_facts):
    (fault,) = write_bad(folder, EncodedSample((ImageSegment(b"<html>", (8, 8)),)), tokenizer_facts)
    assert "image_format" in fault


def test_damage_inside_of_an_image_is_found_by_decoding(folder, tokenizer_facts, make_image):
    data = bytearray(make_image(64, 64))
    start = data.index(b"\xff\xc4")
    data[start + 4 : start + 24] = b"\xff" * 20
    write_dataset(
        folder, [EncodedSample((ImageSegment(bytes(data), (64, 64)),))], dataset_name="t", tokenizer=tokenizer_facts
    )
    assert faults(folder) == []
    (fault,) = faults(folder, decode=True)
    assert "image_damaged" in fault


def rewrite_index(folder, change) -> None:
    """Change an index and make the manifest agree with its bytes."""
    path = folder / "00000.idx"
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    manifest = load_manifest(folder)
    files = manifest.shards[0].files | {"idx": FileFacts(bytes=len(content), crc32=zlib.crc32(content))}
    shard = dataclasses.replace(manifest.shards[0], files=files)
    save_manifest(dataclasses.replace(manifest, shards=(shard, *manifest.shards[1:])), folder)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("length", "do not fill the data file"),
        ("pointer", "do not fill the data file"),
        ("border", "borders of the samples"),
        ("mode", "a mode is not one of"),
        ("kind", "holds Counts"),
    ],
)
def test_index_that_does_not_fit_the_data_is_found(dataset, where, message):
    sequences = load_manifest(dataset).shards[0].counts.sequences
    after_lengths = 34 + 4 * sequences
    after_pointers = after_lengths + 8 * sequences

    def change(content: bytearray) -> None:
        last = len(content) - 1
        position = {"length": 34, "pointer": after_lengths, "border": after_pointers, "mode": last, "kind": last}[where]
        content[position] = {"length": 8, "pointer": 1, "border": 1, "mode": 9, "kind": 2 - content[last]}[where]

    rewrite_index(dataset, change)
    assert any(message in fault for fault in faults(dataset))


def change_manifest(dataset, **changes):
    save_manifest(dataclasses.replace(load_manifest(dataset), **changes), dataset)


def test_manifest_without_a_checksum_of_itself_is_read(dataset):
    tree = json.loads((dataset / MANIFEST_FILE).read_text())
    del tree["crc32"]
    (dataset / MANIFEST_FILE).write_text(json.dumps(tree))
    assert faults(dataset) == []


def test_every_flipped_bit_of_the_manifest_is_found(dataset):
    path = dataset / MANIFEST_FILE
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"manifest.json"):
            load_manifest(dataset)


def test_manifest_whose_sum_does_not_hold_is_found(dataset):
    change_manifest(dataset, documents=13)
    assert faults(dataset) == ["manifest: 13 documents were used, but there are 12 samples"]


def test_list_of_rejects_is_held_against_the_manifest(dataset):
    change_manifest(dataset, documents=13, rejects={"json_type": 1}, rejects_file=FileFacts(bytes=3, crc32=0))
    assert faults(dataset) == ["rejects.jsonl: file is missing"]
    (dataset / "rejects.jsonl").write_text("{}\n")
    assert faults(dataset) == ["rejects.jsonl: checksum differs from the manifest"]
    (dataset / "rejects.jsonl").write_text("\n\n\n")
    assert "rejects.jsonl: 3 rows, but the manifest says 1" in faults(dataset)


def test_many_faults_of_a_shard_are_cut_short(folder, tokenizer_facts):
    writer_samples = [EncodedSample((ImageSegment(b"x", (8, 8)),))] * 300
    write_dataset(folder, writer_samples, dataset_name="tiny", tokenizer=tokenizer_facts)
    found = faults(folder)
    assert len(found) == 101
    assert found[-1] == "00000: more faults follow"


def test_file_in_place_of_a_folder_is_an_error_that_names_the_folder(dataset):
    with pytest.raises(
        DataError, match=f"path is a file, not the folder of a dataset.*fix: give the folder: {dataset}$"
    ):
        faults(dataset / "00000.bin")


def test_folder_without_dataset_is_an_error(tmp_path):
    with pytest.raises(DataError, match="has no manifest.json"):
        faults(tmp_path)


def test_empty_shard_is_found(dataset):
    empty = ShardWriter(dataset / "00000").close()
    manifest = load_manifest(dataset)
    manifest = dataclasses.replace(manifest, shards=(empty, manifest.shards[1]), documents=6)
    save_manifest(manifest, dataset)
    assert any("a sequence is empty" in fault for fault in faults(dataset))


def rewrite_sizes(folder, content: bytes) -> None:
    """Write other sizes and make the manifest agree with them."""
    (folder / "00000.dim").write_bytes(content)
    manifest = load_manifest(folder)
    files = manifest.shards[0].files | {"dim": FileFacts(bytes=len(content), crc32=zlib.crc32(content))}
    shard = dataclasses.replace(manifest.shards[0], files=files)
    save_manifest(dataclasses.replace(manifest, shards=(shard, *manifest.shards[1:])), folder)


@pytest.mark.parametrize("decode", [False, True])
def test_size_that_is_not_the_images_names_shard_and_image(dataset, decode):
    sizes = np.fromfile(dataset / "00000.dim", "<u2").reshape(-1, 2)
    sizes[2] = (40, 48)
    rewrite_sizes(dataset, sizes.tobytes())
    (fault,) = faults(dataset, decode=decode)
    assert fault.startswith("00000.bin: sample ")
    assert fault.endswith(": image has 48x40 pixels, but entry 2 of 00000.dim says 40x48")


def test_another_number_of_sizes_is_found(dataset):
    sizes = (dataset / "00000.dim").read_bytes()
    rewrite_sizes(dataset, sizes[:-4])
    number = len(sizes) // 4
    assert faults(dataset) == [f"00000.dim: {number - 1} sizes for {number} images"]
