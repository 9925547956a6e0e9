import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from megatron_vlm.config import ConfigError, DataError, StorageError
from megatron_vlm.config.prepare import JoinRules, Recipe
from megatron_vlm.config.sources.interleaved import InterleavedRules
from megatron_vlm.data.files.inputs import find_record_files
from megatron_vlm.data.prepare.chunk import ChunkJob, ImagePlace
from megatron_vlm.data.prepare.merge import merge_datasets, split_dataset
from megatron_vlm.data.prepare.run import PrepareJob, prepare
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.manifest import REJECTS_FILE, load_manifest, save_manifest
from megatron_vlm.data.shards.verify import verify_dataset
from megatron_vlm.data.sources.interleaved.source import InterleavedSource
from megatron_vlm.data.sources.text import TextSource
from megatron_vlm.platform.files.durable import UNFINISHED
from tests.support.preparing import content, prepare_array


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def texts(tmp_path, make_lines) -> Path:
    """Five files, with rejects in the second and nothing but rejects in the last two."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(5):
        records = [{"text": f"the red cat {number} {i}"} for i in range(number + 1)] if number < 3 else []
        make_lines(folder / f"{number}.jsonl", records + ([{"text": ""}] if number != 2 else []))
    return folder


def text_job(texts, tokenizer_path, output, **options) -> PrepareJob:
    source = TextSource(find_record_files((texts,)))
    part = ChunkJob(source=source, recipe=Recipe(bos=False, eos=False), tokenizer=tokenizer_path, **options)
    return PrepareJob(output=output, dataset_name="text", chunk=part)


def mmc4_job(mmc4, tokenizer_path, output) -> PrepareJob:
    part = ChunkJob(
        source=InterleavedSource(find_record_files((mmc4,)), InterleavedRules()),
        recipe=Recipe(variant="pairs", join=JoinRules()),
        tokenizer=tokenizer_path,
        images=ImagePlace(folder=mmc4 / "images"),
        max_shard_bytes=3000,
    )
    return PrepareJob(output=output, dataset_name="mmc4", chunk=part)


def test_three_parts_merged_are_the_bytes_of_one_run(texts, tokenizer_path, tmp_path):
    prepare(text_job(texts, tokenizer_path, tmp_path / "straight"))
    parts = prepare_array(text_job(texts, tokenizer_path, tmp_path / "joined"), 3)
    merge_datasets(tmp_path / "joined", parts[::-1])
    assert content(tmp_path / "joined") == content(tmp_path / "straight")
    assert list(verify_dataset(tmp_path / "joined")) == []


def test_a_variant_with_several_shards_a_file_is_the_bytes_of_one_run(mmc4, tokenizer_path, tmp_path):
    files = len(find_record_files((mmc4,)))
    prepare(mmc4_job(mmc4, tokenizer_path, tmp_path / "straight"))
    merge_datasets(tmp_path / "joined", prepare_array(mmc4_job(mmc4, tokenizer_path, tmp_path / "joined"), files))
    assert content(tmp_path / "joined") == content(tmp_path / "straight")


def test_each_part_is_a_dataset_that_verifies_also_without_a_sample(texts, tokenizer_path, tmp_path):
    parts = prepare_array(text_job(texts, tokenizer_path, tmp_path / "joined"), 5)
    assert [len(ShardedDataset.open(part)) for part in parts] == [1, 2, 3, 0, 0]
    assert [fault for part in parts for fault in verify_dataset(part)] == []


def test_no_shard_is_copied_and_the_parts_may_be_deleted(texts, tokenizer_path, tmp_path):
    parts = prepare_array(text_job(texts, tokenizer_path, tmp_path / "joined"), 3)
    merge_datasets(tmp_path / "joined", parts)
    assert (tmp_path / "joined" / "00000.bin").samefile(parts[0] / "00000.bin")
    for part in parts:
        shutil.rmtree(part)
    assert list(verify_dataset(tmp_path / "joined")) == []


def test_merged_again_is_left_alone(texts, tokenizer_path, tmp_path):
    parts = prepare_array(text_job(texts, tokenizer_path, tmp_path / "joined"), 2)
    first = merge_datasets(tmp_path / "joined", parts)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "joined").iterdir()}
    assert merge_datasets(tmp_path / "joined", parts) == first
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "joined").iterdir()} == before
    assert not (tmp_path / f"joined{UNFINISHED}").exists()


def test_what_an_interrupted_merge_left_is_replaced(texts, tokenizer_path, tmp_path):
    parts = prepare_array(text_job(texts, tokenizer_path, tmp_path / "joined"), 2)
    (tmp_path / f"joined{UNFINISHED}").mkdir()
    (tmp_path / f"joined{UNFINISHED}" / "00000.bin").write_text("half")
    merge_datasets(tmp_path / "joined", parts)
    assert list(verify_dataset(tmp_path / "joined")) == []


def test_missing_parts_are_named(texts, tokenizer_path, tmp_path):
    parts = prepare_array(text_job(texts, tokenizer_path, tmp_path / "joined"), 4)
    with pytest.raises(ConfigError, match="2 of 4 parts are missing: 2/4, 4/4"):
        merge_datasets(tmp_path / "joined", [parts[0], parts[2]])
    with pytest.raises(ConfigError, match="no part is given"):
        merge_datasets(tmp_path / "joined", [])


def test_a_part_given_twice_under_two_names_is_refused(texts, tokenizer_path, tmp_path):
    parts = prepare_array(text_job(texts, tokenizer_path, tmp_path / "joined"), 2)
    shutil.copytree(parts[0], tmp_path / "copy")
    with pytest.raises(ConfigError, match="part 1/2 is given twice"):
        merge_datasets(tmp_path / "joined", [*parts, tmp_path / "copy"])


def test_parts_of_other_preparations_are_refused(texts, tokenizer_path, tmp_path):
    two = prepare_array(text_job(texts, tokenizer_path, tmp_path / "two"), 2)
    three = prepare_array(text_job(texts, tokenizer_path, tmp_path / "three"), 3)
    other = prepare_array(text_job(texts, tokenizer_path, tmp_path / "other", max_shard_bytes=1), 2)
    with pytest.raises(ConfigError, match=r"parts come from arrays of \[2, 3\] tasks"):
        merge_datasets(tmp_path / "joined", [two[0], three[1]])
    with pytest.raises(ConfigError, match="different inputs, options or tokenizers"):
        merge_datasets(tmp_path / "joined", [two[0], other[1]])


def test_a_whole_dataset_is_no_part(texts, tokenizer_path, tmp_path):
    prepare(text_job(texts, tokenizer_path, tmp_path / "whole"))
    with pytest.raises(ConfigError, match="dataset is whole, not a part of one"):
        merge_datasets(tmp_path / "joined", [tmp_path / "whole"])


def test_an_unfinished_or_cut_part_is_a_data_error(texts, tokenizer_path, tmp_path):
    parts = prepare_array(text_job(texts, tokenizer_path, tmp_path / "joined"), 2)
    (parts[0] / "00000.bin").write_bytes(b"x")
    with pytest.raises(DataError, match="shard file is truncated"):
        merge_datasets(tmp_path / "joined", parts)
    (parts[0] / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"folder has no manifest\.json"):
        merge_datasets(tmp_path / "joined", parts)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: None, "file is missing"),
        (lambda content: content[:-5], "bytes, but the manifest says"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "checksum differs from the manifest"),
    ],
)
def test_a_lost_or_damaged_list_of_rejects_is_a_data_error(texts, tokenizer_path, tmp_path, damage, message):
    parts = prepare_array(text_job(texts, tokenizer_path, tmp_path / "joined"), 2)
    content = damage((parts[1] / REJECTS_FILE).read_bytes())
    (parts[1] / REJECTS_FILE).unlink()
    if content is not None:
        (parts[1] / REJECTS_FILE).write_bytes(content)
    with pytest.raises(DataError, match=f"part is damaged: {REJECTS_FILE}: .*{message}.*prepare it again"):
        merge_datasets(tmp_path / "joined", parts)
    assert not (tmp_path / "joined").exists()


def test_a_part_without_a_checksum_of_its_rejects_is_a_data_error(texts, tokenizer_path, tmp_path):
    parts = prepare_array(text_job(texts, tokenizer_path, tmp_path / "joined"), 2)
    save_manifest(dataclasses.replace(load_manifest(parts[0]), rejects_file=None), parts[0])
    with pytest.raises(DataError, match=f"{REJECTS_FILE}: the manifest has no checksum of it"):
        merge_datasets(tmp_path / "joined", parts)


def test_output_with_something_else_is_refused_and_kept(texts, tokenizer_path, tmp_path):
    parts = prepare_array(text_job(texts, tokenizer_path, tmp_path / "joined"), 2)
    (tmp_path / "joined").mkdir()
    (tmp_path / "joined" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="output folder holds something else"):
        merge_datasets(tmp_path / "joined", parts)
    assert [path.name for path in (tmp_path / "joined").iterdir()] == ["thesis.tex"]
    assert not (tmp_path / f"joined{UNFINISHED}").exists()


def test_another_file_system_is_a_storage_error_that_says_so(texts, tokenizer_path, tmp_path, monkeypatch):
    def across(source, target):
        raise OSError(18, "Invalid cross-device link", str(source), None, str(target))

    parts = prepare_array(text_job(texts, tokenizer_path, tmp_path / "joined"), 2)
    monkeypatch.setattr(os, "link", across)
    with pytest.raises(StorageError, match="cross-device link .*on the file system of the input"):
        merge_datasets(tmp_path / "joined", parts)
    assert not (tmp_path / "joined").exists()


def test_nothing_but_rejects_in_all_parts_is_a_data_error(tmp_path, make_lines, tokenizer_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(2):
        make_lines(folder / f"{number}.jsonl", [{"text": ""}])
    parts = prepare_array(text_job(folder, tokenizer_path, tmp_path / "joined"), 2)
    assert (parts[0] / REJECTS_FILE).exists()
    with pytest.raises(DataError, match="none of 2 documents became a sample"):
        merge_datasets(tmp_path / "joined", parts)


def token_lists(folder: Path) -> list[list[int]]:
    return [sample.segments[0].input_ids.tolist() for sample in ShardedDataset.open(folder)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_split_dataset_has_every_sample_once_and_in_order(texts, tokenizer_path, tmp_path, count):
    prepare(text_job(texts, tokenizer_path, tmp_path / "whole"))
    folders = split_dataset(tmp_path / "whole", tmp_path / "piece", count)
    assert [folder.name for folder in folders] == [f"piece-{i + 1}-of-{count}" for i in range(count)]
    assert sum(map(token_lists, folders), []) == token_lists(tmp_path / "whole")
    assert [fault for folder in folders for fault in verify_dataset(folder)] == []
    assert (folders[0] / "00000.bin").samefile(tmp_path / "whole" / "00000.bin")


def test_a_dataset_is_split_where_the_pieces_are_most_even(texts, tokenizer_path, tmp_path):
    prepare(text_job(texts, tokenizer_path, tmp_path / "whole", max_shard_bytes=1))  # 6 shards of one sample
    folders = split_dataset(tmp_path / "whole", tmp_path / "piece", 3)
    assert [len(ShardedDataset.open(folder)) for folder in folders] == [2, 2, 2]


def test_more_pieces_than_shards_are_refused(texts, tokenizer_path, tmp_path):
    prepare(text_job(texts, tokenizer_path, tmp_path / "whole"))
    for count in (0, 4):
        with pytest.raises(ConfigError, match=f"3 shards cannot become {count} datasets"):
            split_dataset(tmp_path / "whole", tmp_path / "piece", count)


def test_a_part_is_not_split(texts, tokenizer_path, tmp_path):
    (part, _) = prepare_array(text_job(texts, tokenizer_path, tmp_path / "joined"), 2)
    with pytest.raises(ConfigError, match="dataset is a part of one .*join the parts first"):
        split_dataset(part, tmp_path / "piece", 1)
