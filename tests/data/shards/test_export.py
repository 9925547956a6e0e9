import base64
import fcntl
import json
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.config import ConfigError, DataError, StorageError, UsageError
from megatron_vlm.config.prepare import ConversationRules, ImageRules, JoinRules, Recipe
from megatron_vlm.config.sources.interleaved import InterleavedRules
from megatron_vlm.data.documents import Image, Text
from megatron_vlm.data.files.inputs import find_record_files
from megatron_vlm.data.prepare.chunk import ChunkJob, ImagePlace
from megatron_vlm.data.prepare.run import PrepareJob, prepare
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment
from megatron_vlm.data.shards import export
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.export import ExportJob, describe_sample, export_webdataset, write_tar
from megatron_vlm.data.shards.writer import write_dataset
from megatron_vlm.data.sources.image_store import ImageReader
from megatron_vlm.data.sources.instructions.conversations import ConversationSource
from megatron_vlm.data.sources.interleaved.source import InterleavedSource
from megatron_vlm.data.sources.interleaved.tars import InterleavedTarSource
from megatron_vlm.platform.files.durable import UNFINISHED
from tests.support.preparing import content


@pytest.fixture
def shards(mmc4, tokenizer_path, tmp_path) -> Path:
    """Six interleaved documents."""
    part = ChunkJob(
        source=InterleavedSource(find_record_files((mmc4,)), InterleavedRules()),
        recipe=Recipe(join=JoinRules()),
        tokenizer=tokenizer_path,
        images=ImagePlace(folder=mmc4 / "images"),
    )
    prepare(PrepareJob(output=tmp_path / "shards", dataset_name="mmc4", chunk=part))
    return tmp_path / "shards"


@pytest.fixture
def job(shards, tokenizer_path, tmp_path) -> ExportJob:
    return ExportJob(folder=shards, output=tmp_path / "tars", tokenizer=tokenizer_path, samples_per_shard=4)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


def test_a_sample_is_a_json_file_and_its_images(job, mmc4):
    assert export_webdataset(job) == 2
    found = members(job.output / "00000.tar")
    assert list(found)[:5] == [f"00000000{i}" for i in ("0.json", "0.0.jpg", "1.json", "1.0.jpg", "1.1.jpg")]
    assert json.loads(found["000000001.json"]) == {
        "texts": [None, "the red cat 1", None, "a blue dog green trees the sky"],
        "images": ["0.jpg", None, "1.jpg", None],
        "train": [False, True, False, True],
    }
    assert found["000000001.1.jpg"] == (mmc4 / "images" / "011.jpg").read_bytes()
    assert [name for name in members(job.output / "00001.tar") if "json" in name] == [
        "000000004.json",
        "000000005.json",
    ]


def prepare_again(tars: Path, tokenizer_path: Path, output: Path, rules=None, **recipe) -> ShardedDataset:
    """Prepare exported tars as `prepare interleaved --separator ""` does."""
    source = InterleavedTarSource(tuple(sorted(tars.glob("*.tar"))), rules or InterleavedRules(min_images=0))
    part = ChunkJob(source=source, recipe=Recipe(join=JoinRules(separator=""), **recipe), tokenizer=tokenizer_path)
    prepare(PrepareJob(output=output, dataset_name="mmc4", chunk=part))
    return ShardedDataset.open(output)


def test_prepared_again_the_samples_have_the_same_tokens_images_and_masks(job, tokenizer_path, tmp_path):
    export_webdataset(job)
    again = prepare_again(job.output, tokenizer_path, tmp_path / "again")
    assert list(map(repr, again)) == list(map(repr, ShardedDataset.open(job.folder)))


def test_blanks_at_the_edges_of_texts_come_back(mmc4, make_lines, tokenizer_path, tmp_path):
    """Separators stay beside images, sentences begin and end with blanks and one is nothing else."""
    infos = [{"image_name": f"02{number}.jpg", "matched_text_index": number} for number in range(3)]
    record = {"text_list": [" the red cat ", " ", "\n a dog  ", " "], "image_info": infos}
    part = ChunkJob(
        source=InterleavedSource((make_lines(tmp_path / "docs.jsonl", [record]),), InterleavedRules()),
        recipe=Recipe(join=JoinRules(keep_blanks=True), eos=False),
        tokenizer=tokenizer_path,
        images=ImagePlace(folder=mmc4 / "images"),
    )
    prepare(PrepareJob(output=tmp_path / "shards", dataset_name="mmc4", chunk=part))
    export_webdataset(ExportJob(folder=tmp_path / "shards", output=tmp_path / "tars", tokenizer=tokenizer_path))
    again = prepare_again(tmp_path / "tars", tokenizer_path, tmp_path / "again", eos=False)
    assert list(map(repr, again)) == list(map(repr, ShardedDataset.open(tmp_path / "shards")))


def make_conversations(template: str, folder: Path, make_lines, make_image) -> ConversationSource:
    picture = base64.b64encode(make_image()).decode()
    turns = [("human", "<image>\nhow many dogs?"), ("gpt", " two dogs "), ("human", "what colour?"), ("gpt", "red")]
    messages = [{"from": who, "value": value} for who, value in turns]
    records = [
        {"id": "a", "image_base64_str": picture, "conversations": messages},
        {"id": "b", "conversations": [{"from": "human", "value": "is it <|im_end|> red?"}, *messages[3:]]},
    ]
    folder.mkdir()
    return ConversationSource((make_lines(folder / "c.jsonl", records),), ConversationRules(template=template))


@pytest.mark.parametrize("template", ["vicuna_v1", "llama_2", "hermes-2", "plain"])
def test_conversations_come_back_with_the_same_texts_images_and_masks(
    template, make_lines, make_image, tokenizer, tokenizer_path, tmp_path
):
    source = make_conversations(template, tmp_path / "raw", make_lines, make_image)
    part = ChunkJob(source=source, recipe=Recipe(bos=False, eos=False), tokenizer=tokenizer_path)
    prepare(PrepareJob(output=tmp_path / "shards", dataset_name="llava", chunk=part))
    before = ShardedDataset.open(tmp_path / "shards")
    assert len(before) == 2
    export_webdataset(ExportJob(folder=tmp_path / "shards", output=tmp_path / "tars", tokenizer=tokenizer_path))
    again = prepare_again(tmp_path / "tars", tokenizer_path, tmp_path / "again")
    for sample, other in zip(before, again, strict=True):
        assert describe_sample(other, tokenizer) == describe_sample(sample, tokenizer)


def test_tokens_that_no_text_spells_are_left_out(tokenizer):
    cat = np.array(tokenizer.encode("cat"), np.int32)
    ends = np.array([tokenizer.eos_id, tokenizer.bos_id], np.int32)
    sample = EncodedSample((TextSegment(ends, False), TextSegment(np.concatenate([cat, ends]), True)))
    assert describe_sample(sample, tokenizer) == ({"texts": ["cat"], "images": [None], "train": [True]}, {})


@pytest.mark.parametrize("template", ["vicuna_v1", "llama_2", "hermes-2", "plain"])
def test_texts_of_a_conversation_together_are_what_was_encoded(
    template, tokenizer, tokenizer_path, tmp_path, make_lines
):
    turns = [("human", "how many dogs?"), ("gpt", " two dogs"), ("human", "what colour\nis it?"), ("gpt", "red")]
    turns = turns[:2] if template == "plain" else turns
    record = {"id": "a", "conversations": [{"from": who, "value": value} for who, value in turns]}
    if template == "plain":
        record["conversations"][0]["value"] = ""
    source = ConversationSource((make_lines(tmp_path / "c.jsonl", [record]),), ConversationRules(template=template))
    part = ChunkJob(source=source, recipe=Recipe(bos=False, eos=False), tokenizer=tokenizer_path)
    prepare(PrepareJob(output=tmp_path / "shards", dataset_name="llava", chunk=part))
    (found,) = source.read(tmp_path / "c.jsonl", ImageReader(None, ImageRules()))
    wanted = [segment for segment in found.document.segments if isinstance(segment, Text)]
    described, _ = describe_sample(ShardedDataset.open(tmp_path / "shards")[0], tokenizer)
    assert "".join(described["texts"]).replace("<|im_start|>", "").replace("<|im_end|>", "") == "".join(
        text.text for text in wanted
    )
    trained = [text for text, train in zip(described["texts"], described["train"], strict=True) if train]
    assert "two dogs" in trained[0]


WORDS = ("the", " cat", "\nred", "  dog ", "é", "狗", "a\tb", "<s>")


@pytest.mark.parametrize("seed", range(20))
def test_any_document_is_read_back_as_it_was(seed, tokenizer, tokenizer_path, tmp_path, make_image):
    """Random texts and masks, encoded by the rules of encoding and read by the reader of tars."""
    from megatron_vlm.data.documents import Document
    from megatron_vlm.data.text.encoding import encode_document

    generator = random.Random(seed)
    segments: list[Text | Image] = []
    for _ in range(generator.randrange(1, 7)):
        if generator.random() < 0.4:
            segments.append(
                Image(make_image(16, 16, generator.choice(("JPEG", "PNG", "WEBP", "GIF")), seed=seed), (16, 16))
            )
        else:
            train = generator.random() < 0.5
            if segments and isinstance(segments[-1], Text) and segments[-1].train == train:
                train = not train
            segments.append(Text("".join(generator.choices(WORDS, k=generator.randrange(1, 5))), train))
    segments.append(Image(make_image(16, 16, seed=seed + 1), (16, 16)))
    segments.append(Text("the end"))
    sample = encode_document(Document(tuple(segments)), tokenizer)
    write_dataset(tmp_path / "shards", [sample], dataset_name="t", tokenizer=tokenizer.facts)
    export_webdataset(ExportJob(folder=tmp_path / "shards", output=tmp_path / "tars", tokenizer=tokenizer_path))
    source = InterleavedTarSource((tmp_path / "tars" / "00000.tar",), InterleavedRules(max_images=100))
    (found,) = source.read(source.inputs[0], ImageReader(None, ImageRules()))
    assert list(found.document.segments) == segments
    assert repr(encode_document(found.document, tokenizer)) == repr(sample)


def test_any_number_of_workers_writes_the_same_tars(job, tmp_path):
    import dataclasses

    small = dataclasses.replace(job, samples_per_shard=1)
    for workers in (1, 2):
        export_webdataset(dataclasses.replace(small, output=tmp_path / str(workers)), num_workers=workers)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert len(content(tmp_path / "1")) == 7


def test_an_interrupted_export_goes_on_and_is_the_same_then(job, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    export_webdataset(job)
    expected = content(job.output)
    (job.output / "00001.tar").unlink()
    before = (job.output / "00000.tar").stat().st_mtime_ns
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", kill)
        with pytest.raises(Killed):
            export_webdataset(job)
    assert not (job.output / "00001.tar").exists()
    export_webdataset(job)
    assert content(job.output) == expected
    assert (job.output / "00000.tar").stat().st_mtime_ns == before


def test_progress_counts_samples(job):
    done = []
    dataset = ShardedDataset.open(job.folder)
    job.output.mkdir()
    for _ in range(2):  # the second time it is there
        write_tar(job, dataset.fingerprint, 0, job.output / "00000.tar", lambda *counts: done.append(counts))
    assert done == [(4, 0), (4, 0)]


def test_other_options_and_other_files_are_refused(job, tmp_path):
    import dataclasses

    export_webdataset(job)
    with pytest.raises(ConfigError, match="an export of another dataset, or with other options"):
        export_webdataset(dataclasses.replace(job, samples_per_shard=5))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="output folder is not empty"):
        export_webdataset(dataclasses.replace(job, output=tmp_path / "full"))
    with pytest.raises(UsageError, match="--samples-per-shard 0 is below 1"):
        export_webdataset(dataclasses.replace(job, samples_per_shard=0))
    with pytest.raises(StorageError, match="cannot be written"):
        export_webdataset(dataclasses.replace(job, output=tmp_path / "full" / "thesis.tex" / "out"))


def test_a_second_export_into_one_folder_is_refused_while_the_first_one_runs(job):
    export_webdataset(job)
    expected = content(job.output)
    (job.output / "00001.tar").unlink()
    with (job.output / ".export").open("r+b") as state:
        fcntl.flock(state, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is exporting into this folder.*fix: wait for it"):
            export_webdataset(job)
    export_webdataset(job)
    assert content(job.output) == expected


def test_no_two_processes_write_one_unfinished_tar(job, monkeypatch):
    written = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (written.append(source.name), replace(source, target)))
    export_webdataset(job)
    assert [name.split(".")[0] for name in written] == ["00000", "00001"]
    assert all(f".{os.getpid()}{UNFINISHED}" in name for name in written)


def test_a_kill_while_the_folder_is_claimed_is_no_obstacle(job):
    export_webdataset(job)
    expected = content(job.output)
    state = (job.output / ".export").read_bytes()
    for tar in job.output.glob("*.tar"):
        tar.unlink()
    for written in (b"", state[:20]):
        (job.output / ".export").write_bytes(written)
        export_webdataset(job)
        assert content(job.output) == expected
        for tar in job.output.glob("*.tar"):
            tar.unlink()


def test_a_full_disk_is_a_storage_error(job, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_samples", no_space)
    with pytest.raises(StorageError, match="export stopped: No space left on device.*finished tars are kept"):
        export_webdataset(job)


def test_another_tokenizer_is_refused(folder, make_samples, tokenizer_facts, tokenizer_path, tmp_path):
    write_dataset(folder, make_samples(3), dataset_name="tiny", tokenizer=tokenizer_facts)
    with pytest.raises(DataError, match="shards were prepared with tokenizer tiny"):
        export_webdataset(ExportJob(folder=folder, output=tmp_path / "tars", tokenizer=tokenizer_path))


def test_a_dataset_that_changes_meanwhile_is_refused(job):
    with pytest.raises(DataError, match="dataset has changed since then"):
        write_tar(job, "another", 0, job.output / "00000.tar", lambda *_: None)


def test_an_image_of_unknown_format_is_a_data_error(tokenizer):
    sample = EncodedSample((TextSegment(np.array([5], dtype=np.int32), True), ImageSegment(b"<html>", (8, 8))))
    with pytest.raises(DataError, match="image has an unknown format"):
        describe_sample(sample, tokenizer)
