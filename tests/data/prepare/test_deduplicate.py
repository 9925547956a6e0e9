import json
import os
import random
from pathlib import Path

import pytest

from megatron_vlm.config import ConfigError, DataError, StorageError
from megatron_vlm.config.prepare import JoinRules, Recipe
from megatron_vlm.config.sources.interleaved import InterleavedRules
from megatron_vlm.data.files.inputs import find_record_files
from megatron_vlm.data.prepare import deduplicate
from megatron_vlm.data.prepare.duplicates import FILES, fingerprint
from megatron_vlm.data.prepare.merge import merge_datasets
from megatron_vlm.data.prepare.part import PREPARE_AGAIN, ImagePlace, PartJob
from megatron_vlm.data.prepare.run import PrepareJob, prepare
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.manifest import REJECTS_FILE
from megatron_vlm.data.shards.verify import verify_dataset
from megatron_vlm.data.sources.interleaved.source import InterleavedSource
from tests.support.preparing import content, prepare_shares, run_until

FILES_OF_CORPUS = 5


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def corpus(tmp_path, make_lines, make_image):
    """Interleaved documents of few images and few sentences, so that many repeat: corpus(seed)."""

    def make(seed: int = 0) -> Path:
        generator = random.Random(seed)
        folder = tmp_path / f"corpus_{seed}"
        (folder / "images").mkdir(parents=True)
        for image in range(4):
            (folder / "images" / f"{image}.jpg").write_bytes(make_image(16, 16, seed=image))
        for number in range(FILES_OF_CORPUS):
            records = []
            for document in range(generator.randrange(4, 9)):
                count = generator.choice((1, 1, 2, 2, 7))  # 7: two more than there are sentences
                infos = [
                    {"image_name": f"{generator.randrange(4)}.jpg", "matched_text_index": min(index, 1)}
                    for index in range(count)
                ]
                text = [generator.choice(("the red cat", "a blue dog")) for _ in range(2)]
                url = f"http://x/{number}/{document}"
                records.append({"url": url, "text_list": text if count < 7 else 5, "image_info": infos})
            make_lines(folder / f"docs_{number}.jsonl", records)
        return folder

    return make


def make_job(corpus: Path, tokenizer_path: Path, output: Path, kind: str | None, **options) -> PrepareJob:
    variant = options.pop("variant", "full")
    part = PartJob(
        source=InterleavedSource(find_record_files((corpus,)), InterleavedRules()),
        recipe=Recipe(variant=variant, join=JoinRules()),
        tokenizer=tokenizer_path,
        images=ImagePlace(folder=corpus / "images"),
        drop_duplicates=kind,
        **options,
    )
    return PrepareJob(output=output, source_name="mmc4", part=part)


def reject_rows(folder: Path, reason: str = "duplicate") -> list[dict]:
    rows = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    return [row for row in rows if row["reason"] == reason]


def test_what_stays_is_the_first_of_each_kind_in_order(corpus, tokenizer_path, tmp_path):
    folder = corpus()
    prepare(make_job(folder, tokenizer_path, tmp_path / "all", None))
    whole = list(ShardedDataset.open(tmp_path / "all"))
    for kind in ("documents", "images"):
        prepare(make_job(folder, tokenizer_path, tmp_path / kind, kind))
        expected: dict[bytes, object] = {}
        for sample in whole:
            expected.setdefault(fingerprint(sample, kind), sample)
        found = list(ShardedDataset.open(tmp_path / kind))
        assert 0 < len(found) < len(whole)
        assert list(map(repr, found)) == list(map(repr, expected.values()))
        assert list(verify_dataset(tmp_path / kind)) == []


def test_each_duplicate_is_a_reject_that_names_what_it_repeats(tmp_path, make_lines, make_image, tokenizer_path):
    folder = tmp_path / "corpus"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.jpg").write_bytes(make_image(16, 16))
    record = {"text_list": ["the cat"], "image_info": [{"image_name": "a.jpg", "matched_text_index": 0}]}
    make_lines(folder / "0.jsonl", [record | {"url": "u0"}, record | {"text_list": 5}, record | {"url": "u2"}])
    make_lines(folder / "1.jsonl", [record | {"url": "u3"}, record | {"url": "u4", "text_list": ["the dog"]}])
    manifest = prepare(make_job(folder, tokenizer_path, tmp_path / "shards", "documents"))
    assert (manifest.documents, manifest.counts.samples) == (5, 2)
    assert manifest.rejects == {"duplicate": 2, "json_type": 1}
    rows = [{"file": "0.jsonl", "line": 3, "key": "u2"}, {"file": "1.jsonl", "line": 1, "key": "u3"}]
    details = {"reason": "duplicate", "detail": "repeats 0.jsonl line 1 key u0"}
    assert reject_rows(tmp_path / "shards") == [row | details for row in rows]

    prepare(make_job(folder, tokenizer_path, tmp_path / "images", "images"))
    assert reject_rows(tmp_path / "images")[-1]["detail"] == "has the images of 0.jsonl line 1 key u0"
    assert len(reject_rows(tmp_path / "images")) == 3


def test_a_document_that_keeps_a_sample_is_no_reject(tmp_path, make_lines, make_image, tokenizer_path):
    folder = tmp_path / "corpus"
    (folder / "images").mkdir(parents=True)
    for name in "ab":
        (folder / "images" / f"{name}.jpg").write_bytes(make_image(16, 16, seed=ord(name)))

    def record(*names: str) -> dict:
        infos = [{"image_name": f"{name}.jpg", "matched_text_index": i} for i, name in enumerate(names)]
        return {"url": "".join(names), "text_list": ["the cat"] * len(names), "image_info": infos}

    make_lines(folder / "0.jsonl", [record("a", "a"), record("b", "a"), record("a", "b"), record("b")])
    manifest = prepare(make_job(folder, tokenizer_path, tmp_path / "shards", "documents", variant="pairs"))
    assert (manifest.documents, manifest.rejects) == (4, {"duplicate": 2})
    assert manifest.notes["duplicate_samples"] == 2  # the second pair of each of the first two documents
    assert manifest.counts.samples == 2
    assert [row["key"] for row in reject_rows(tmp_path / "shards")] == ["ab", "b"]
    assert list(verify_dataset(tmp_path / "shards")) == []


@pytest.mark.parametrize("kind", ["documents", "images"])
@pytest.mark.parametrize("variant", ["full", "pairs"])
@pytest.mark.parametrize("seed", range(3))
def test_parts_merged_are_the_bytes_of_one_run(corpus, tokenizer_path, tmp_path, kind, variant, seed):
    folder = corpus(seed)
    options = {"variant": variant, "max_shard_bytes": random.Random(seed).choice((1, 1500, 1 << 30))}
    manifest = prepare(make_job(folder, tokenizer_path, tmp_path / "straight", kind, **options))
    parts = prepare_shares(make_job(folder, tokenizer_path, tmp_path / "joined", kind, **options), 3)
    merge_datasets(tmp_path / "joined", parts[::-1])
    assert content(tmp_path / "joined") == content(tmp_path / "straight")
    assert manifest.rejects["duplicate"] > 0
    assert list(verify_dataset(tmp_path / "joined")) == []


def test_merge_links_shards_without_duplicates_and_writes_the_others(tmp_path, make_lines, corpus, tokenizer_path):
    folder = corpus()
    names = sorted(path.name for path in folder.glob("*.jsonl"))
    (folder / names[-1]).write_bytes((folder / names[0]).read_bytes())
    parts = prepare_shares(make_job(folder, tokenizer_path, tmp_path / "joined", "documents"), FILES_OF_CORPUS)
    manifest = merge_datasets(tmp_path / "joined", parts)
    samples = [len(ShardedDataset.open(part)) for part in parts]
    assert len(manifest.shards) < FILES_OF_CORPUS  # nothing is left of the last
    for number, shard in enumerate(manifest.shards):
        linked = (tmp_path / "joined" / f"{shard.name}.bin").samefile(parts[number] / "00000.bin")
        assert linked == (shard.counts.samples == samples[number])
    assert not any(name.startswith(".") for name in os.listdir(tmp_path / "joined"))


def test_a_share_keeps_duplicates_and_what_the_join_needs(corpus, tokenizer_path, tmp_path):
    folder = corpus()
    parts = prepare_shares(make_job(folder, tokenizer_path, tmp_path / "joined", "documents"), 2)
    for part in parts:
        assert set(FILES) <= set(os.listdir(part))
        assert list(verify_dataset(part)) == []
    prepare(make_job(folder, tokenizer_path, tmp_path / "straight", "documents"))
    assert not set(FILES) & set(os.listdir(tmp_path / "straight"))


@pytest.mark.parametrize("name", [*FILES, REJECTS_FILE])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: None, "file is missing"),
        (lambda content: content[:-5], "bytes, the manifest says"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "checksum differs from the manifest"),
    ],
)
def test_lost_and_damaged_files_of_a_part_are_data_errors(corpus, tokenizer_path, tmp_path, name, damage, message):
    parts = prepare_shares(make_job(corpus(), tokenizer_path, tmp_path / "joined", "documents"), 2)
    content = damage((parts[1] / name).read_bytes())
    (parts[1] / name).unlink()
    if content is not None:
        (parts[1] / name).write_bytes(content)
    with pytest.raises(DataError, match=f"part is damaged: {name}: .*{message}.*fix: {PREPARE_AGAIN}"):
        merge_datasets(tmp_path / "joined", parts)
    assert any(name in fault for fault in verify_dataset(parts[1]))
    assert not (tmp_path / "joined").exists()


def test_parts_with_and_without_removal_do_not_mix(corpus, tokenizer_path, tmp_path):
    folder = corpus()
    one = prepare_shares(make_job(folder, tokenizer_path, tmp_path / "one", "documents"), 2)
    other = prepare_shares(make_job(folder, tokenizer_path, tmp_path / "other", None), 2)
    with pytest.raises(ConfigError, match="different inputs, options"):
        merge_datasets(tmp_path / "joined", [one[0], other[1]])


def test_the_option_is_recorded_and_another_one_refused(corpus, tokenizer_path, tmp_path):
    folder = corpus()
    manifest = prepare(make_job(folder, tokenizer_path, tmp_path / "shards", "images"))
    assert manifest.options["drop_duplicates"] == "images"
    with pytest.raises(ConfigError, match="differs in options: drop_duplicates"):
        prepare(make_job(folder, tokenizer_path, tmp_path / "shards", None))


@pytest.mark.parametrize("way", ["run", "merge"])
def test_an_interruption_at_any_write_gives_the_same_bytes(corpus, tokenizer_path, tmp_path, monkeypatch, way):
    folder = corpus()
    prepare(make_job(folder, tokenizer_path, tmp_path / "straight", "documents", variant="pairs"))
    expected = content(tmp_path / "straight")
    parts = prepare_shares(make_job(folder, tokenizer_path, tmp_path / "joined", "documents", variant="pairs"), 2)
    finished, moment = False, 0
    while not finished:
        moment += 1
        job = make_job(folder, tokenizer_path, tmp_path / f"{way}_{moment}", "documents", variant="pairs")
        action = {"run": lambda j=job: prepare(j), "merge": lambda j=job: merge_datasets(j.output, parts)}[way]
        finished = run_until(moment, action, monkeypatch)
        action()
        assert content(job.output) == expected, f"stopped before operation {moment}"
    assert moment > 10


def test_a_full_disk_while_shards_are_written_again_is_a_storage_error(corpus, tokenizer_path, tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device", "00000.bin")

    job = make_job(corpus(), tokenizer_path, tmp_path / "shards", "documents")
    with monkeypatch.context() as patched:
        patched.setattr(deduplicate.ShardWriter, "add", no_space)
        with pytest.raises(StorageError, match="No space left on device"):
            prepare(job)
    assert prepare(job).rejects["duplicate"] > 0
