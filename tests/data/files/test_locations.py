import gzip
import io
import json
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.config.prepare import JoinRules, Recipe
from megatron_vlm.config.sources.interleaved import InterleavedRules
from megatron_vlm.config.sources.interleaved import Options as InterleavedOptions
from megatron_vlm.config.sources.pairs import Options as PairOptions
from megatron_vlm.data.files.inputs import find_instruction_files, find_record_files
from megatron_vlm.data.files.locations import (
    RemoteFile,
    folder_of,
    list_location,
    name_files,
    parse_location,
    size_of,
)
from megatron_vlm.data.files.records import read_records
from megatron_vlm.data.files.tars import TarReader
from megatron_vlm.data.prepare.array_task import ArrayTask
from megatron_vlm.data.prepare.chunk import ChunkJob, ImagePlace
from megatron_vlm.data.prepare.merge import merge_datasets
from megatron_vlm.data.prepare.run import PrepareJob, prepare
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.shards.manifest import load_manifest
from megatron_vlm.data.sources.image_store import RemoteImages
from megatron_vlm.data.sources.interleaved.source import InterleavedSource
from megatron_vlm.data.sources.interleaved.source import find_source as find_interleaved_source
from megatron_vlm.data.sources.pairs.source import find_source as find_pair_source


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_urls_are_told_from_paths():
    assert parse_location("s3://bucket/a.tar") == RemoteFile("s3://bucket/a.tar")
    assert parse_location("zip::s3://bucket/a.zip") == RemoteFile("zip::s3://bucket/a.zip")
    for text in ("a.tar", "/data/a.tar", "a:b/c", "./x", "s3:/bucket"):
        assert parse_location(text) == Path(text)


def test_files_of_folders_and_patterns_are_listed_by_name_with_their_sizes(bucket):
    for name in ("b.tar", "a.tar", "a.parquet", "sub/c.tar"):
        bucket.pipe(f"/c/{name}", name.encode())
    found = list_location(RemoteFile("memory:///c"), (".tar",))
    assert [(file.name, file.size) for file in found] == [("a.tar", 5), ("b.tar", 5)]
    assert list_location(RemoteFile("memory:///c/*.tar"), ()) == found
    assert [file.name for file in list_location(RemoteFile("memory:///c/**/*.tar"), ())] == ["a.tar", "b.tar", "c.tar"]
    assert list_location(RemoteFile("memory:///c/a.parquet"), ()) == [RemoteFile("memory:///c/a.parquet")]


def test_what_is_not_there_is_named(bucket):
    bucket.pipe("/c/a.tar", b"")
    with pytest.raises(ConfigError, match=r"input does not exist \(memory:///x\); fix: check --input"):
        list_location(RemoteFile("memory:///x"), ())
    with pytest.raises(ConfigError, match="no file matches --images"):
        list_location(RemoteFile("memory:///c/*.jpg"), (), "--images")


def test_patterns_of_paths_are_matched_by_name(tmp_path):
    for name in ("b.tar", "a.tar", "a[1].tar", "c.jpg"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "d.tar").mkdir()
    assert [path.name for path in list_location(tmp_path / "*.tar", ())] == ["a.tar", "a[1].tar", "b.tar"]
    assert list_location(tmp_path / "a[1].tar", ()) == [tmp_path / "a[1].tar"]
    with pytest.raises(ConfigError, match=r"no file matches --input .*x\*.tar"):
        list_location(tmp_path / "x*.tar", ())


def test_files_and_folders_are_told_apart(bucket):
    bucket.pipe("/c/a.tar", b"xyz")
    file, folder, none = (RemoteFile(f"memory:///{name}") for name in ("c/a.tar", "c", "none"))
    assert [one.is_file() for one in (file, folder, none)] == [True, False, False]
    assert [one.is_dir() for one in (file, folder, none)] == [False, True, False]
    assert [one.is_web for one in (folder, RemoteFile("http://host/c"))] == [False, True]
    assert size_of(file) == 3
    assert [folder_of(one).url for one in (folder, file, RemoteFile("memory:///c/*.tar"))] == [
        "memory:///c",
        "memory:///c/",
        "memory:///c/",
    ]


def test_a_stream_reads_seeks_and_tells_as_a_file_does(bucket):
    data = bytes(range(256)) * 20
    bucket.pipe("/a", data)
    with RemoteFile("memory:///a").open("rb") as stream:
        assert stream.read(3) == data[:3]
        assert stream.seek(-5, io.SEEK_END) == len(data) - 5
        assert stream.read() == data[-5:]
        stream.seek(10)
        stream.seek(5, io.SEEK_CUR)
        assert (stream.tell(), stream.read(2)) == (15, data[15:17])
        assert stream.seekable()


@pytest.mark.parametrize("suffix", ["jsonl.GZ", "JSONL.Zip", "JSON"])
def test_records_in_files_with_capitals_are_those_of_others(tmp_path, suffix):
    lines = b'{"a": 1}\n{"a": 2}\n'
    path = tmp_path / f"a.{suffix}"
    if suffix == "JSONL.Zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.jsonl", lines)
    else:
        path.write_bytes(gzip.compress(lines) if suffix.endswith("GZ") else lines)
    (found,) = find_record_files((tmp_path,))
    assert [record.value for record in read_records(found)] == [{"a": 1}, {"a": 2}]


def find_interleaved(paths):
    return find_interleaved_source(paths, InterleavedOptions(), None)


def find_pairs(paths):
    return find_pair_source(paths, PairOptions(), None)


@pytest.mark.parametrize("find", [find_interleaved, find_pairs, find_record_files, find_instruction_files])
@pytest.mark.parametrize("name", ["a.tar.gz", "a.txt", "*.tar.*"])
def test_a_named_file_of_an_unknown_kind_is_refused_before_it_is_read(tmp_path, find, name):
    (tmp_path / name.replace("*", "a").replace("a.tar.a", "a.tar.gz")).write_bytes(b"x")
    with pytest.raises(
        ConfigError, match=r"file of --input is not one of .*\.json.*fix: unpack it, rename it or leave it out"
    ):
        find((tmp_path / name,))


def test_files_without_a_suffix_are_json_and_others_of_a_folder_are_left_alone(tmp_path):
    for name in ("README.md", "a.jsonl", "records"):
        (tmp_path / name).write_bytes(b"")
    assert find_record_files((tmp_path,)) == (tmp_path / "a.jsonl",)
    assert find_record_files((tmp_path / "records",)) == (tmp_path / "records",)


def test_json_files_named_beside_tars_of_pairs_are_refused_not_lost(coyo):
    (coyo / "00000_stats.json").write_text("{}")
    (coyo / "more.jsonl").write_text("{}")
    assert len(find_pairs((coyo,)).inputs) == 2
    assert len(find_pairs((coyo / "0*",)).inputs) == 2
    with pytest.raises(ConfigError, match=r"file of --input is not one of .tar, .parquet \(.*more.jsonl\)"):
        find_pairs((coyo / "*",))


def test_files_are_named_below_the_folder_that_all_are_in(tmp_path):
    paths = [tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "a" / "x"]
    assert name_files(paths) == {"a/x": paths[0], "b/x": paths[1]}
    assert name_files([RemoteFile("s3://b/x/a.tar"), RemoteFile("s3://b/y/a.tar")]).keys() == {"x/a.tar", "y/a.tar"}
    assert name_files([]) == {}


def test_urls_that_differ_in_their_query_alone_are_refused_not_lost():
    urls = [RemoteFile(f"https://h/get.tar?id={number}") for number in (1, 1, 2)]
    assert list(name_files(urls[:2])) == ["get.tar"]
    with pytest.raises(ConfigError, match=r"two URLs differ only in their query or user.*\(https://h/get.tar\)"):
        name_files(urls)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "jsonl.zip"])
def test_records_of_a_url_are_those_of_the_file(bucket, tmp_path, suffix):
    records = [{"a": n, "text": "x" * n} for n in range(50)]
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    plain = json.dumps(records).encode() if suffix == "json" else lines
    path = tmp_path / f"a.{suffix}"
    if suffix.endswith("zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.jsonl", plain)
    else:
        path.write_bytes(gzip.compress(plain) if suffix.endswith("gz") else plain)
    bucket.pipe(f"/{path.name}", path.read_bytes())
    assert list(read_records(RemoteFile(f"memory:///{path.name}"))) == list(read_records(path))


def test_tar_of_a_url_has_the_members_of_the_file(bucket, tmp_path, make_tar):
    path = make_tar(tmp_path / "a.tar", [(f"{n}.jpg", bytes([n]) * n * 100) for n in range(40)])
    bucket.pipe("/a.tar", path.read_bytes())
    found = []
    for location in (path, RemoteFile("memory:///a.tar")):
        with TarReader(location) as tar:
            found.append([(member.name, tar.read(member, 1 << 20, "")) for member in tar.members()])
    assert found[0] == found[1]


@pytest.fixture
def remote_images(bucket):
    bucket.pipe("/c/images/a.jpg", b"picture")
    bucket.pipe("/c/images/sub/b.jpg", b"other")
    bucket.pipe("/c/secret.jpg", b"secret")
    return RemoteImages(RemoteFile("memory:///c/images"), max_bytes=100)


def test_images_of_a_bucket_are_found_by_relative_path(remote_images):
    assert remote_images.read("a.jpg", None) == b"picture"
    assert remote_images.read("sub/../sub/b.jpg", None) == b"other"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "image_path") for name in ("../secret.jpg", "sub/../../secret.jpg", "/c/secret.jpg", "a\0b", "..")),
        *((name, "image_missing") for name in ("none.jpg", "sub", "", None, "memory:///c/secret.jpg")),
    ],
)
def test_names_that_leave_the_prefix_or_have_no_object_are_rejected(remote_images, name, reason):
    with pytest.raises(RejectError) as caught:
        remote_images.read(name, None)
    assert caught.value.reason == reason


def test_too_large_objects_are_rejected(remote_images, bucket):
    bucket.pipe("/c/images/large.jpg", bytes(101))
    with pytest.raises(RejectError, match="image_bytes: 101 bytes, at most 100"):
        remote_images.read("large.jpg", None)


def mmc4_job(tokenizer_path, output, *, inputs, images, array_task=None) -> PrepareJob:
    source = InterleavedSource(find_record_files(inputs), InterleavedRules())
    part = ChunkJob(source=source, recipe=Recipe(join=JoinRules()), tokenizer=tokenizer_path, images=images)
    return PrepareJob(output=output, dataset_name="mmc4", chunk=part, array_task=array_task)


def coyo_job(tokenizer_path, output, *inputs, array_task=None) -> PrepareJob:
    part = ChunkJob(source=find_pair_source(inputs, PairOptions(), None), recipe=Recipe(), tokenizer=tokenizer_path)
    return PrepareJob(output=output, dataset_name="coyo", chunk=part, array_task=array_task)


def copy_to(bucket, folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.pipe(f"/{folder.name}/{path.relative_to(folder)}", path.read_bytes())


def test_datasets_from_a_bucket_are_the_bytes_of_those_from_a_disk(mmc4, coyo, bucket, tokenizer_path, tmp_path):
    copy_to(bucket, mmc4)
    copy_to(bucket, coyo)
    prepare(mmc4_job(tokenizer_path, tmp_path / "a", inputs=(mmc4,), images=ImagePlace(folder=mmc4 / "images")))
    place = ImagePlace(folder=RemoteFile("memory:///mmc4/images"))
    prepare(mmc4_job(tokenizer_path, tmp_path / "b", inputs=(RemoteFile("memory:///mmc4/*.jsonl"),), images=place))
    assert content(tmp_path / "a") == content(tmp_path / "b")
    prepare(coyo_job(tokenizer_path, tmp_path / "c", coyo))
    prepare(coyo_job(tokenizer_path, tmp_path / "d", RemoteFile("memory:///coyo")))
    assert content(tmp_path / "c") == content(tmp_path / "d")


def test_images_of_tars_at_a_url_are_joined(mmc4, bucket, make_tar, tokenizer_path, tmp_path):
    members = [(path.name, path.read_bytes()) for path in sorted((mmc4 / "images").iterdir())]
    tar = make_tar(tmp_path / "images.tar", members)
    bucket.pipe("/images.tar", tar.read_bytes())
    for name, place in (("a", tar), ("b", RemoteFile("memory:///images.tar"))):
        prepare(mmc4_job(tokenizer_path, tmp_path / name, inputs=(mmc4,), images=ImagePlace(tars=(place,))))
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize("kind", ["file", "zip"])
def test_several_workers_read_urls_by_themselves(coyo, tokenizer_path, tmp_path, kind):
    with zipfile.ZipFile(tmp_path / "coyo.zip", "w") as archive:
        for path in sorted(coyo.iterdir()):
            archive.write(path, path.name)
    url = f"file://{coyo}" if kind == "file" else f"zip://*::file://{tmp_path}/coyo.zip"
    prepare(coyo_job(tokenizer_path, tmp_path / "a", coyo))
    prepare(coyo_job(tokenizer_path, tmp_path / "b", RemoteFile(url)), num_workers=2)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_parts_of_tars_at_a_url_are_merged(coyo, bucket, tokenizer_path, tmp_path):
    copy_to(bucket, coyo)
    whole = RemoteFile("memory:///coyo")
    prepare(coyo_job(tokenizer_path, tmp_path / "whole", whole))
    for number in (1, 2):
        prepare(coyo_job(tokenizer_path, tmp_path / f"part{number}", whole, array_task=ArrayTask(number, 2)))
    merge_datasets(tmp_path / "merged", [tmp_path / "part1", tmp_path / "part2"])
    assert content(tmp_path / "whole") == content(tmp_path / "merged")


def test_two_stores_in_one_dataset_keep_their_files_apart(bucket, make_lines, tokenizer_path, tmp_path, mmc4):
    copy_to(bucket, mmc4)
    inputs = (mmc4, RemoteFile("memory:///mmc4"))
    prepare(mmc4_job(tokenizer_path, tmp_path / "a", inputs=inputs, images=ImagePlace(folder=mmc4 / "images")))
    manifest = load_manifest(tmp_path / "a")
    assert manifest.documents == 12
    assert len(manifest.options["inputs"]) == 4


def test_a_pattern_that_matches_no_file_stands_for_folders(tmp_path, bucket):
    for name in ("a_data/1.jsonl", "b_data/2.jsonl", "b_data/2.txt", "c/3.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
        bucket.pipe(f"/p/{name}", b"")
    for found in (
        list_location(tmp_path / "*_data", (".jsonl",)),
        list_location(RemoteFile("memory:///p/*_data"), (".jsonl",)),
    ):
        assert [file.name for file in found] == ["1.jsonl", "2.jsonl"]
    for pattern in (tmp_path / "*_data", RemoteFile("memory:///p/*_data")):
        with pytest.raises(ConfigError, match="no file matches --images"):
            list_location(pattern, (".tar",), "--images")


def test_the_folder_of_a_pattern_with_patterns_of_folders_is_the_last_one_with_a_name(tmp_path):
    (tmp_path / "data" / "x").mkdir(parents=True)
    assert folder_of(tmp_path / "data" / "*" / "train.jsonl") == tmp_path / "data"
    assert folder_of(RemoteFile("memory:///data/*/train.jsonl")) == RemoteFile("memory:///data/")
    assert folder_of(tmp_path / "data" / "[x]" / "*.jsonl") == tmp_path / "data"
    (tmp_path / "data" / "[y]").mkdir()
    assert folder_of(tmp_path / "data" / "[y]") == tmp_path / "data" / "[y]"


@pytest.mark.parametrize(
    ("find", "names"),
    [
        (lambda paths: find_record_files(paths), ("a.jsonl", "b.txt")),
        (lambda paths: find_instruction_files(paths), ("a.jsonl", "b.tar")),
        (lambda paths: find_interleaved_source(paths, InterleavedOptions(), None), ("a.jsonl", "b.tar")),
        (lambda paths: find_interleaved_source(paths, InterleavedOptions(), None), ("a.tar", "b.txt")),
        (lambda paths: find_pair_source(paths, PairOptions(), None), ("a.tar", "b.jsonl")),
        (lambda paths: find_pair_source(paths, PairOptions(), None), ("a.jsonl", "b.txt")),
    ],
    ids=["records", "instructions", "json and tar", "tar and nothing", "pairs in tars and json", "pairs in json"],
)
def test_a_folder_that_nothing_would_be_read_of_is_refused(tmp_path, find, names):
    folders = tuple(tmp_path / name[0] for name in names)
    for folder, name in zip(folders, names, strict=True):
        folder.mkdir()
        (folder / name).write_bytes(b"")
    find(folders[:1])
    with pytest.raises(ConfigError, match=f"input has no .*{folders[1]}.*leave it out"):
        find(folders)


def test_what_img2dataset_writes_beside_its_tars_may_be_named_with_them(coyo):
    (coyo / "00000_stats.json").write_bytes(b"{}")
    (coyo / "part-00000.parquet").unlink()
    named = tuple(sorted(coyo.iterdir()))
    assert find_pair_source(named, PairOptions(), None).inputs == find_pair_source((coyo,), PairOptions(), None).inputs


def test_the_tables_of_tars_may_be_named_with_them(tmp_path):
    (tmp_path / "00000.tar").write_bytes(b"")
    columns = {"key": ["a"], "url": ["u"], "caption": ["c"], "status": ["success"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "00000.parquet")
    named = (tmp_path / "00000.parquet", tmp_path / "00000.tar")
    assert find_interleaved_source(named, InterleavedOptions(), None).inputs == (tmp_path / "00000.tar",)
