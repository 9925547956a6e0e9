import contextlib
import dataclasses
import fcntl
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from megatron_vlm.config import ConfigError, DataError, StorageError
from megatron_vlm.config.prepare import ImageRules, JoinRules, Recipe
from megatron_vlm.config.sources.interleaved import InterleavedRules
from megatron_vlm.config.sources.pairs import Options as PairOptions
from megatron_vlm.data.files.inputs import find_record_files
from megatron_vlm.data.images.decoding import decode_rgb
from megatron_vlm.data.prepare import run as prepare_module
from megatron_vlm.data.prepare.array_task import ArrayTask
from megatron_vlm.data.prepare.chunk import ChunkJob, ImagePlace
from megatron_vlm.data.prepare.merge import merge_datasets
from megatron_vlm.data.prepare.run import PrepareJob, prepare
from megatron_vlm.data.samples import ImageSegment
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.manifest import WORK_FOLDER, load_manifest
from megatron_vlm.data.shards.verify import verify_dataset
from megatron_vlm.data.sources.interleaved.source import InterleavedSource
from megatron_vlm.data.sources.pairs.source import find_source as find_pair_source
from megatron_vlm.data.sources.text import TextSource
from tests.support.preparing import content, run_until


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """What fsync guards against, a power failure, is not tested; thousands of them would be most of the time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "shards"


def mmc4_job(mmc4, tokenizer_path, output, *, variant="full", rules=None, images=None, **options) -> PrepareJob:
    part = ChunkJob(
        source=InterleavedSource(find_record_files((mmc4,)), rules or InterleavedRules()),
        recipe=Recipe(variant=variant, join=JoinRules()),
        tokenizer=tokenizer_path,
        images=images or ImagePlace(folder=mmc4 / "images"),
        **options,
    )
    return PrepareJob(output=output, dataset_name="mmc4", chunk=part)


def coyo_job(coyo, tokenizer_path, output) -> PrepareJob:
    part = ChunkJob(source=find_pair_source((coyo,), PairOptions(), None), recipe=Recipe(), tokenizer=tokenizer_path)
    return PrepareJob(output=output, dataset_name="coyo", chunk=part)


def text_job(path, tokenizer_path, output, **options) -> PrepareJob:
    part = ChunkJob(
        source=TextSource(find_record_files((path,))),
        recipe=Recipe(bos=False, eos=False),
        tokenizer=tokenizer_path,
        **options,
    )
    return PrepareJob(output=output, dataset_name="text", chunk=part)


def tokens_of(sample) -> list:
    """Ids of text segments, and bytes of images."""
    return [s.encoded if isinstance(s, ImageSegment) else s.input_ids.tolist() for s in sample.segments]


def test_documents_become_the_expected_tokens(mmc4, tokenizer, tokenizer_path, output):
    prepare(mmc4_job(mmc4, tokenizer_path, output))
    dataset = ShardedDataset.open(output)
    images = [(mmc4 / "images" / f"02{i}.jpg").read_bytes() for i in range(3)]
    assert tokens_of(dataset[2]) == [
        [1],
        images[0],
        tokenizer.encode("the red cat 2"),
        images[1],
        tokenizer.encode("a blue dog"),
        images[2],
        [*tokenizer.encode("green trees the sky"), 2],
    ]


@pytest.mark.parametrize(
    ("variant", "samples", "images", "first"),
    [
        ("full", 6, 12, ["", "I", "the red cat 0 a blue dog green trees the sky"]),
        ("pairs", 12, 12, ["", "I", "the red cat 0"]),
        ("images-first", 6, 12, ["", "I", "the red cat 0 a blue dog green trees the sky"]),
        ("text-only", 6, 0, ["the red cat 0 a blue dog green trees the sky"]),
    ],
)
def test_variants_count_samples_and_documents_apart(
    mmc4, tokenizer, tokenizer_path, output, variant, samples, images, first
):
    manifest = prepare(mmc4_job(mmc4, tokenizer_path, output, variant=variant))
    assert (manifest.documents, manifest.rejected) == (6, 0)
    assert (manifest.counts.samples, manifest.counts.images) == (samples, images)
    sample = ShardedDataset.open(output)[0]
    assert ["I" if isinstance(s, ImageSegment) else tokenizer.decode(s.input_ids) for s in sample.segments] == first
    assert list(verify_dataset(output)) == []


def test_pairs_that_img2dataset_has_no_image_of_are_rejects_and_the_sum_holds(coyo, make_table, tokenizer_path, output):
    make_table(coyo / "00001.parquet", {"key": ["000010000", "gone"], "error_message": [None, "HTTP 404"]})
    manifest = prepare(coyo_job(coyo, tokenizer_path, output))
    assert manifest.documents == 9 == manifest.counts.samples + manifest.rejected
    assert manifest.rejects == {"image_missing": 1}
    (row,) = [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]
    assert (row["file"], row["line"], row["key"]) == ("00001.tar", None, "gone")


def test_images_are_found_in_tars_by_url(mmc4, make_tar, tokenizer_path, output, tmp_path):
    members = []
    for number, path in enumerate(sorted((mmc4 / "images").iterdir())):
        record = json.dumps({"url": f"http://x/{path.name}"}).encode()
        members += [(f"{number:03d}.jpg", path.read_bytes()), (f"{number:03d}.json", record)]
    tars = (make_tar(tmp_path / "0.tar", members[::2] + members[1::2]),)
    prepare(mmc4_job(mmc4, tokenizer_path, output / "tars", images=ImagePlace(tars=tars)))
    prepare(mmc4_job(mmc4, tokenizer_path, output / "folder"))
    tar_samples, folder_samples = (ShardedDataset.open(output / name) for name in ("tars", "folder"))
    assert [tokens_of(one) for one in tar_samples] == [tokens_of(one) for one in folder_samples]


def test_any_number_of_workers_and_of_parts_writes_the_same_bytes(mmc4, tokenizer_path, tmp_path):
    for number in (2, 3, 4):
        shutil.copy(mmc4 / f"docs_shard_{number % 2}_v3.jsonl", mmc4 / f"docs_shard_{number}_v3.jsonl")
    options = {"max_shard_bytes": 3000}
    prepare(mmc4_job(mmc4, tokenizer_path, tmp_path / "straight", **options))
    for workers in (2, 4):
        prepare(mmc4_job(mmc4, tokenizer_path, tmp_path / f"{workers}", **options), num_workers=workers)
    job = mmc4_job(mmc4, tokenizer_path, tmp_path / "parts", **options)
    tasks = [ArrayTask(index, 3) for index in (1, 2, 3)]
    for task in tasks:
        prepare(dataclasses.replace(job, output=task.folder(job.output), array_task=task))
    merge_datasets(job.output, [task.folder(job.output) for task in tasks])
    for name in ("2", "4", "parts"):
        assert content(tmp_path / name) == content(tmp_path / "straight")


def test_any_number_of_workers_writes_the_same_bytes_of_pairs(coyo, tokenizer_path, tmp_path):
    for workers in (1, 2):
        prepare(coyo_job(coyo, tokenizer_path, tmp_path / f"{workers}"), num_workers=workers)
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_a_large_input_file_becomes_several_shards(mmc4, tokenizer_path, output):
    manifest = prepare(mmc4_job(mmc4, tokenizer_path, output, max_shard_bytes=3000))
    assert [shard.name for shard in manifest.shards] == [f"{i:05d}" for i in range(len(manifest.shards))]
    assert len(manifest.shards) > 2
    assert list(verify_dataset(output)) == []
    assert len(ShardedDataset.open(output)) == 6


def test_image_options_change_what_is_kept(mmc4, tokenizer_path, output):
    manifest = prepare(mmc4_job(mmc4, tokenizer_path, output, image_rules=ImageRules(resize_shorter_side=16)))
    assert manifest.notes == {"shrunk_images": 12}


def test_prepared_again_with_the_same_options_is_left_alone(mmc4, tokenizer_path, output):
    first = prepare(mmc4_job(mmc4, tokenizer_path, output))
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert prepare(mmc4_job(mmc4, tokenizer_path, output)) == first
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_prepared_again_with_other_options_is_refused(mmc4, tokenizer_path, output, tmp_path):
    prepare(mmc4_job(mmc4, tokenizer_path, output))
    with pytest.raises(ConfigError, match="holds a dataset that differs in options: rules"):
        prepare(mmc4_job(mmc4, tokenizer_path, output, rules=InterleavedRules(max_images=2)))
    with pytest.raises(ConfigError, match="differs in dataset name: mmc4"):
        prepare(dataclasses.replace(mmc4_job(mmc4, tokenizer_path, output), dataset_name="other"))
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer_path.read_bytes() + b"\x1a\x04\x18\x00\x20\x00")
    with pytest.raises(ConfigError, match="differs in tokenizer: tiny.model of sha256"):
        prepare(mmc4_job(mmc4, other, output))


def test_changed_input_is_refused(mmc4, tokenizer_path, output):
    prepare(mmc4_job(mmc4, tokenizer_path, output))
    with (mmc4 / "docs_shard_0_v3.jsonl").open("a") as stream:
        stream.write("{}\n")
    with pytest.raises(ConfigError, match="differs in options: inputs"):
        prepare(mmc4_job(mmc4, tokenizer_path, output))


def test_folder_with_other_files_is_refused(mmc4, tokenizer_path, output):
    output.mkdir()
    (output / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="output folder is not empty"):
        prepare(mmc4_job(mmc4, tokenizer_path, output))


def test_folder_in_use_is_refused(mmc4, tokenizer_path, output):
    (output / WORK_FOLDER).mkdir(parents=True)
    with (output / WORK_FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is preparing this folder"):
            prepare(mmc4_job(mmc4, tokenizer_path, output))


def test_output_that_cannot_be_written_is_a_storage_error(mmc4, tokenizer_path, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written"):
        prepare(mmc4_job(mmc4, tokenizer_path, tmp_path / "file" / "shards"))


def test_full_disk_is_a_storage_error_and_the_next_run_goes_on(mmc4, tokenizer_path, output, monkeypatch):
    from megatron_vlm.data.prepare import chunk

    def no_space(*_):
        raise OSError(28, "No space left on device", "00000.bin")

    with monkeypatch.context() as patched:
        patched.setattr(chunk.ShardWriter, "add", no_space)
        with pytest.raises(StorageError, match="No space left on device .*00000.bin.*run the same command again"):
            prepare(mmc4_job(mmc4, tokenizer_path, output))
    assert prepare(mmc4_job(mmc4, tokenizer_path, output)).counts.samples == 6


def test_nothing_but_rejects_is_an_error_that_says_why(tmp_path, make_lines, tokenizer_path, output):
    path = make_lines(tmp_path / "a.jsonl", [{}, {"text": "\x00"}, b"{"])
    with pytest.raises(DataError, match="none of 3 documents became a sample: .*json_syntax 1, unknown_fields 1"):
        prepare(text_job(path, tokenizer_path, output))
    assert len((output / "rejects.jsonl").read_text().splitlines()) == 3


def test_reject_rows_have_file_line_key_and_reason(tmp_path, make_lines, tokenizer_path, output):
    path = make_lines(tmp_path / "a.jsonl", [{"text": "the sky"}, {"text": 5, "id": "k"}, {"text": "water"}])
    manifest = prepare(text_job(path, tokenizer_path, output))
    (row,) = [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]
    assert row == {
        "file": "a.jsonl",
        "line": 2,
        "key": "k",
        "reason": "json_type",
        "detail": "field text is int, not str",
    }
    assert manifest.documents == 3 == manifest.counts.samples + manifest.rejected


def test_input_files_of_one_name_in_two_folders_are_told_apart(tmp_path, make_lines, tokenizer_path, output):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make_lines(tmp_path / name / "a.jsonl", [{"text": name}])
    job = text_job(tmp_path / "one", tokenizer_path, output)
    files = (tmp_path / "one" / "a.jsonl", tmp_path / "two" / "a.jsonl")
    job = dataclasses.replace(job, chunk=dataclasses.replace(job.chunk, source=TextSource(files)))
    assert list(prepare(job).options["inputs"]) == ["one/a.jsonl", "two/a.jsonl"]


WORDS = "the red cat and a blue dog under green trees".split()


@pytest.mark.parametrize("kind", ["mmc4", "coyo"])
def test_an_interruption_at_any_write_gives_the_same_bytes_after_a_second_run(
    request, kind, tokenizer_path, tmp_path, monkeypatch
):
    corpus, make = request.getfixturevalue(kind), {"mmc4": mmc4_job, "coyo": coyo_job}[kind]
    prepare(make(corpus, tokenizer_path, tmp_path / "straight"))
    expected = content(tmp_path / "straight")
    finished, moment = False, 0
    while not finished:
        moment += 1
        job = make(corpus, tokenizer_path, tmp_path / f"until_{moment}")
        finished = run_until(moment, lambda job=job: prepare(job), monkeypatch)
        prepare(job)
        assert content(job.output) == expected, f"stopped before operation {moment}"
    assert moment > 30


@pytest.fixture
def words(tmp_path, make_lines) -> Path:
    """Four files of texts, of which many repeat others."""
    corpus = tmp_path / "text"
    corpus.mkdir()
    generator = random.Random(0)
    for number in range(4):
        records = [{"inputs": " ".join(generator.choices(WORDS, k=4)), "targets": "yes"} for _ in range(1000)]
        make_lines(corpus / f"{number}.jsonl", records)
    return corpus


def kill_at_random_moments(start, folder: Path, times: int) -> None:
    """Start a preparation into `folder_0`, kill it and start it again; the next folder's begins where one ends."""
    start(folder.with_name("straight")).wait()  # the first one of its kind takes longer
    began = time.monotonic()
    start(folder.with_name("timed")).wait()
    seconds, expected = time.monotonic() - began, content(folder.with_name("straight"))
    generator = random.Random(0)
    kills = finished = 0
    while True:
        output = folder.with_name(f"{folder.name}_{finished}")
        process = start(output)
        if kills < times:
            process.wait(generator.uniform(0, seconds))
        else:
            process.wait()
        if process.poll() is None:
            kills += 1
            process.kill()
            process.wait()
            continue
        assert process.poll() == 0
        assert content(output) == expected
        finished += 1
        if kills == times:
            return


class _Forked:
    """A process that has imported everything before it starts, so that each costs milliseconds."""

    def __init__(self, context, job: PrepareJob) -> None:
        self._process = context.Process(target=prepare, args=(job,))
        self._process.start()

    def wait(self, timeout: float | None = None) -> None:
        self._process.join(timeout)

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def test_kill_9_at_twenty_random_moments_gives_the_same_bytes(words, tokenizer_path, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_vlm.data.prepare.run", "megatron_vlm.data.sources.text"])

    def start(output: Path) -> _Forked:
        return _Forked(context, text_job(words, tokenizer_path, output))

    kill_at_random_moments(start, tmp_path / "killed", 20)


class _Command(subprocess.Popen):
    """The command with two workers: the parent is killed, which its workers follow, or all at once."""

    kills = 0

    def wait(self, timeout: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            super().wait(timeout)

    def kill(self) -> None:
        _Command.kills += 1
        (os.kill if _Command.kills % 2 else os.killpg)(self.pid, signal.SIGKILL)


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_of_the_command_and_its_workers_gives_the_same_bytes(words, tokenizer_path, tmp_path, times):
    command = [sys.executable, "-m", "megatron_vlm", "prepare", "text", "--input", str(words), "--workers", "2"]
    command += ["--tokenizer", str(tokenizer_path), "--output"]

    def start(output: Path) -> _Command:
        quiet = subprocess.DEVNULL
        return _Command([*command, str(output)], stdout=quiet, stderr=quiet, start_new_session=True)

    kill_at_random_moments(start, tmp_path / "killed", times)


def test_unfinished_preparation_with_other_options_is_refused(mmc4, tokenizer_path, output, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(prepare_module, "save_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(mmc4_job(mmc4, tokenizer_path, output))
    with pytest.raises(ConfigError, match="unfinished .* differs in options: recipe.variant full, now pairs "):
        prepare(mmc4_job(mmc4, tokenizer_path, output, variant="pairs"))
    with pytest.raises(DataError, match="unfinished"):
        load_manifest(output)
    assert prepare(mmc4_job(mmc4, tokenizer_path, output)).counts.samples == 6


def test_every_file_of_a_part_is_on_the_disk_before_the_part_is_whole(coyo, tokenizer_path, output, monkeypatch):
    flushed: set[int] = set()
    whole: list[dict[str, bool]] = []
    rename = os.rename

    def check(source, target, **options):
        if Path(target).parent.name == "chunks":
            whole.append({path.name: path.stat().st_ino in flushed for path in Path(source).iterdir()})
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "rename", check)
    prepare(coyo_job(coyo, tokenizer_path, output))
    assert len(whole) == 2
    assert {"chunk.json", "rejects.jsonl", "00000.bin"} <= set(whole[0])
    assert [name for files in whole for name, is_flushed in files.items() if not is_flushed] == []


def test_no_worker_process_is_left_behind(mmc4, tokenizer_path, output):
    before = set(multiprocessing.active_children())  # other tests keep processes of their own
    prepare(mmc4_job(mmc4, tokenizer_path, output), num_workers=2)
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("side", [None, 24])
def test_shards_know_the_decoded_size_of_every_image(mmc4, tokenizer_path, output, make_image, side):
    pictures = sorted((mmc4 / "images").iterdir())
    for number, path in enumerate(pictures):
        exif = Image.Exif()
        exif[0x0112] = 6 if number % 2 else 1  # every second picture lies on its side
        Image.open(io.BytesIO(make_image(40 + number, 20 + 2 * number))).save(path, "JPEG", exif=exif)
    job = mmc4_job(mmc4, tokenizer_path, output, image_rules=ImageRules(resize_shorter_side=side))
    prepare(job)
    dataset = ShardedDataset.open(output)
    images = [s for sample in dataset for s in sample.segments if isinstance(s, ImageSegment)]
    sizes = [decode_rgb(image.encoded).size for image in images]
    assert [image.size for image in images] == sizes == list(map(tuple, dataset.image_sizes().tolist()))
    assert len(set(sizes)) == len(pictures)
    assert (side is None) or max(min(size) for size in sizes) == side
