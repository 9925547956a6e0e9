import json
import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.config import ConfigError, DataError, StorageError, UsageError
from megatron_vlm.config.prepare import JoinRules, Recipe
from megatron_vlm.config.sources.interleaved import InterleavedRules
from megatron_vlm.data.files.inputs import find_record_files
from megatron_vlm.data.prepare import deduplicate as module
from megatron_vlm.data.prepare.chunk import ChunkJob, ImagePlace
from megatron_vlm.data.prepare.deduplicate import KINDS, deduplicate, find_repeats, fingerprint
from megatron_vlm.data.prepare.run import PrepareJob, prepare
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.manifest import load_manifest
from megatron_vlm.data.shards.verify import verify_dataset
from megatron_vlm.data.sources.interleaved.source import InterleavedSource
from tests.support.preparing import content, prepare_array, run_until

NUM_FILES = 5


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def make_job(tmp_path, make_lines, make_image, tokenizer_path):
    """A job for documents of few images and few sentences, so that many repeat: make_job(output, seed)."""

    def make(output: Path, seed: int = 0, variant: str = "full", **options) -> PrepareJob:
        generator = random.Random(seed)
        folder = tmp_path / f"corpus_{seed}"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for image in range(4):
            (folder / "images" / f"{image}.jpg").write_bytes(make_image(16, 16, seed=image))
        for number in range(NUM_FILES):
            records = []
            for document in range(generator.randrange(4, 9)):
                infos = [
                    {"image_name": f"{generator.randrange(4)}.jpg", "matched_text_index": index}
                    for index in range(generator.choice((1, 2)))
                ]
                text = [generator.choice(("the red cat", "a blue dog")) for _ in range(2)]
                url = f"http://x/{number}/{document}"
                records.append({"url": url, "text_list": text if document else 5, "image_info": infos})
            make_lines(folder / f"docs_{number}.jsonl", records)
        part = ChunkJob(
            source=InterleavedSource(find_record_files((folder,)), InterleavedRules()),
            recipe=Recipe(variant=variant, join=JoinRules()),
            tokenizer=tokenizer_path,
            images=ImagePlace(folder=folder / "images"),
            **options,
        )
        return PrepareJob(output=output, dataset_name="mmc4", chunk=part)

    return make


def text(*ids: int, train: bool = True) -> TextSegment:
    return TextSegment(np.array(ids, dtype=np.int32), train)


def sample(*segments) -> EncodedSample:
    return EncodedSample(segments)


IMAGE, OTHER = ImageSegment(b"\xff\xd8one"), ImageSegment(b"\xff\xd8two")


@pytest.mark.parametrize("by", KINDS)
def test_the_loss_mask_makes_no_difference(by):
    one, other = sample(text(1, 2), text(3, train=False), IMAGE), sample(text(1, 2, 3), IMAGE)
    assert fingerprint(one, by) == fingerprint(other, by)


@pytest.mark.parametrize(
    "other",
    [
        sample(IMAGE, text(1, 3)),
        sample(text(1, 2), IMAGE),
        sample(OTHER, text(1, 2)),
        sample(IMAGE, IMAGE, text(1, 2)),
        sample(text(1, 2)),
        sample(ImageSegment(IMAGE.encoded + np.array([1], "<i4").tobytes()), text(2)),
    ],
)
def test_documents_differ_in_text_in_images_and_in_their_order(other):
    assert fingerprint(sample(IMAGE, text(1, 2)), "documents") != fingerprint(other, "documents")


def test_only_images_count_where_there_are_any():
    assert fingerprint(sample(text(1), IMAGE), "images") == fingerprint(sample(IMAGE, text(2)), "images")
    assert fingerprint(sample(IMAGE, OTHER, text(1)), "images") != fingerprint(sample(OTHER, IMAGE, text(1)), "images")
    assert fingerprint(sample(text(1)), "images") != fingerprint(sample(text(2)), "images")


def save(folder: Path, shards: list[np.ndarray]) -> list[Path]:
    files = [folder / f"{number}.npy" for number in range(len(shards))]
    for file, digests in zip(files, shards, strict=True):
        np.save(file, digests)
    return files


@pytest.mark.parametrize("bucket_samples", [7, 100, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_repeats_are_those_of_a_loop_over_all(tmp_path, bucket_samples, seed):
    generator = np.random.default_rng(seed)
    shards = [generator.integers(0, 12, (size, 2)).astype("<u8") for size in (50, 90, 1)]
    seen: set[tuple] = set()
    expected = []
    for place, digest in enumerate(map(tuple, np.concatenate(shards).tolist())):
        if digest in seen:
            expected.append(place)
        seen.add(digest)
    assert find_repeats(save(tmp_path, shards), bucket_samples=bucket_samples).tolist() == expected
    assert expected


def test_memory_is_bounded_by_the_bucket(tmp_path):
    generator = np.random.default_rng(0)
    files = save(tmp_path, [generator.integers(0, 1 << 60, (100_000, 2)).astype("<u8") for _ in range(10)])
    tracemalloc.start()
    find_repeats(files, bucket_samples=50_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6  # all of them are 16 MB, and sorting takes several times as much


@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize("variant", ["full", "pairs"])
@pytest.mark.parametrize("seed", range(3))
def test_the_first_of_equal_samples_stays_and_the_result_verifies(make_job, tmp_path, by, variant, seed):
    max_shard_bytes = random.Random(seed).choice((1, 1500, 1 << 30))
    prepare(make_job(tmp_path / "all", seed, variant, max_shard_bytes=max_shard_bytes))
    whole = list(ShardedDataset.open(tmp_path / "all"))
    manifest = deduplicate(tmp_path / "all", tmp_path / "unique", by=by)
    first: dict[bytes, EncodedSample] = {}
    for one in whole:
        first.setdefault(fingerprint(one, by), one)
    found = list(ShardedDataset.open(tmp_path / "unique"))
    assert 0 < len(found) < len(whole)
    assert list(map(repr, found)) == list(map(repr, first.values()))
    assert list(verify_dataset(tmp_path / "unique")) == []
    assert manifest == load_manifest(tmp_path / "unique")
    assert manifest.notes["duplicate_samples"] == len(whole) - len(found)
    assert manifest.options["deduplicated"] == [by]


def test_documents_and_rejects_stay_those_of_the_preparation(make_job, tmp_path):
    before = prepare(make_job(tmp_path / "all"))
    after = deduplicate(tmp_path / "all", tmp_path / "unique", by="documents")
    assert before.rejects == {"json_type": NUM_FILES}
    assert (after.documents, after.rejects) == (before.documents, before.rejects)
    assert (tmp_path / "unique" / "rejects.jsonl").samefile(tmp_path / "all" / "rejects.jsonl")


def test_shards_without_duplicates_are_linked_and_empty_ones_left_out(make_job, tmp_path):
    job = make_job(tmp_path / "all")
    first, last = job.chunk.source.inputs[0], job.chunk.source.inputs[-1]
    last.write_bytes(first.read_bytes())
    before = prepare(job)
    manifest = deduplicate(tmp_path / "all", tmp_path / "unique", by="documents")
    assert len(manifest.shards) < NUM_FILES  # all samples of the last shard are in the first
    linked = 0
    for shard, old in zip(manifest.shards, before.shards, strict=False):
        is_same = (tmp_path / "unique" / f"{shard.name}.bin").samefile(tmp_path / "all" / f"{old.name}.bin")
        assert is_same == (shard.counts == old.counts)
        linked += is_same
    assert linked < len(manifest.shards)


def test_a_dataset_without_duplicates_is_linked_as_a_whole_and_counts_none(make_job, tmp_path):
    prepare(make_job(tmp_path / "all"))
    deduplicate(tmp_path / "all", tmp_path / "unique", by="documents")
    again = deduplicate(tmp_path / "unique", tmp_path / "again", by="documents")
    assert again.options["deduplicated"] == ["documents", "documents"]
    assert again.notes == load_manifest(tmp_path / "unique").notes
    for shard in again.shards:
        assert (tmp_path / "again" / f"{shard.name}.bin").samefile(tmp_path / "unique" / f"{shard.name}.bin")
    assert list(verify_dataset(tmp_path / "again")) == []


def test_several_workers_write_the_same_bytes_and_a_second_run_leaves_them(make_job, tmp_path):
    prepare(make_job(tmp_path / "all"))
    deduplicate(tmp_path / "all", tmp_path / "one", by="images")
    deduplicate(tmp_path / "all", tmp_path / "two", by="images", num_workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    deduplicate(tmp_path / "all", tmp_path / "one", by="images")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()} == times


def test_an_interruption_at_any_write_gives_the_same_bytes(make_job, tmp_path, monkeypatch):
    prepare(make_job(tmp_path / "all"))
    deduplicate(tmp_path / "all", tmp_path / "straight", by="documents")
    finished, moment = False, 0
    while not finished:
        moment += 1
        output = tmp_path / f"out_{moment}"
        finished = run_until(moment, lambda o=output: deduplicate(tmp_path / "all", o, by="documents"), monkeypatch)
        deduplicate(tmp_path / "all", output, by="documents")
        assert content(output) == content(tmp_path / "straight"), f"stopped before operation {moment}"
    assert moment > 10


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(make_job, tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device", "00000.bin")

    prepare(make_job(tmp_path / "all"))
    monkeypatch.setattr(module.ShardWriter, "add", no_space)
    with pytest.raises(StorageError, match="No space left on device"):
        deduplicate(tmp_path / "all", tmp_path / "unique", by="documents")
    assert not list(tmp_path.glob("unique*"))


def test_a_damaged_shard_is_a_data_error(make_job, tmp_path):
    prepare(make_job(tmp_path / "all"))
    path = tmp_path / "all" / "00000.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match="checksum"):
        deduplicate(tmp_path / "all", tmp_path / "unique", by="documents")


def test_what_cannot_be_deduplicated_is_refused(make_job, tmp_path):
    part = prepare_array(make_job(tmp_path / "all"), 2)[0]
    with pytest.raises(ConfigError, match="dataset is a part of one .*join the parts first: data merge"):
        deduplicate(part, tmp_path / "unique", by="documents")
    with pytest.raises(UsageError, match="--by text is not one of documents, images"):
        deduplicate(part, tmp_path / "unique", by="text")
    prepare(make_job(tmp_path / "whole"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="output folder holds something else"):
        deduplicate(tmp_path / "whole", tmp_path / "full", by="documents")


def test_the_command_says_how_many_were_dropped(make_job, tmp_path, capsys):
    before = prepare(make_job(tmp_path / "all")).counts.samples
    assert main(["data", "dedupe", str(tmp_path / "all"), str(tmp_path / "unique"), "--by", "images"]) == 0
    kept = load_manifest(tmp_path / "unique").counts.samples
    assert f"samples {before} = kept {kept} + dropped {before - kept}" in capsys.readouterr().out
    assert main(["data", "verify", str(tmp_path / "unique")]) == 0
    assert json.loads((tmp_path / "unique" / "manifest.json").read_text())["counts"]["samples"] == kept
