import dataclasses

import pytest

from megatron_vlm.config import DataError
from megatron_vlm.data.prepare.chunk import ChunkFacts
from megatron_vlm.data.prepare.joining import check_not_empty, join_facts
from megatron_vlm.data.shards.manifest import Counts, Manifest, ShardFacts, facts_of_file


def chunk(name: str, **rejects: int) -> ChunkFacts:
    shard = ShardFacts(name="00000", input=name, counts=Counts(samples=3), files={})
    return ChunkFacts(
        input=name, documents=3 + sum(rejects.values()), rejects=rejects, notes={"animated_images": 1}, shards=(shard,)
    )


@pytest.fixture
def bare(tokenizer_facts) -> Manifest:
    return Manifest(dataset_name="text", tokenizer=tokenizer_facts, shards=(), documents=0, options={"variant": "full"})


def test_sums_numbers_and_rejects_of_all_chunks_are_those_of_the_whole(bare, tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        (folder / "rejects.jsonl").write_text(f"{folder.name}\n")
    chunks = [chunk("a.jsonl", empty_text=1), chunk("b.jsonl", empty_text=2, json_syntax=1)]
    for _ in range(2):  # the second time after an interruption
        manifest = join_facts(bare, chunks, folders, tmp_path / "rejects.jsonl")
    assert [(shard.name, shard.input) for shard in manifest.shards] == [("00000", "a.jsonl"), ("00001", "b.jsonl")]
    assert (manifest.documents, manifest.rejects) == (10, {"empty_text": 3, "json_syntax": 1})
    assert manifest.notes == {"animated_images": 2}
    assert manifest.options == bare.options
    assert (tmp_path / "rejects.jsonl").read_text() == "a\nb\n"
    assert manifest.rejects_file == facts_of_file(tmp_path / "rejects.jsonl")


def test_a_dataset_without_samples_is_refused_with_its_reasons(bare, tmp_path):
    check_not_empty(dataclasses.replace(bare, shards=chunk("a").shards), tmp_path)
    with pytest.raises(DataError, match="none of 0 documents became a sample: the input is empty"):
        check_not_empty(bare, tmp_path)
    full = dataclasses.replace(bare, documents=4, rejects={"empty_text": 1, "json_syntax": 3})
    with pytest.raises(DataError, match="none of 4 documents became a sample: json_syntax 3, empty_text 1"):
        check_not_empty(full, tmp_path)
