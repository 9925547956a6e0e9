import gzip
import io
import json
import zipfile
from pathlib import Path, PurePosixPath

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from megatron_vlm.config import ConfigError, StorageError
from megatron_vlm.data.documents import JoinRules, RejectError
from megatron_vlm.data.manifest import load_manifest
from megatron_vlm.data.merge import merge_datasets
from megatron_vlm.data.part import ImagePlace, PartJob, Recipe
from megatron_vlm.data.prepare import PrepareJob, prepare
from megatron_vlm.data.share import Share
from megatron_vlm.data.sources import remote
from megatron_vlm.data.sources.image_store import RemoteImages
from megatron_vlm.data.sources.interleaved import InterleavedRules, InterleavedSource
from megatron_vlm.data.sources.locations import (
    RemoteFile,
    can_list,
    folder_of,
    is_file,
    is_folder,
    list_location,
    open_stream,
    parse_location,
    place_of,
    size_of,
)
from megatron_vlm.data.sources.pairs import PairRules, find_pair_source
from megatron_vlm.data.sources.records import read_records
from megatron_vlm.data.sources.remote import RangeReader, RemoteStore
from megatron_vlm.data.sources.source import find_record_files
from megatron_vlm.data.sources.tars import TarReader


@pytest.fixture
def bucket(monkeypatch):
    """An empty object store in this process: bucket.pipe(path, content)."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setattr(remote, "_WAIT_SECONDS", (0.0, 0.0, 0.0))
    return fsspec.filesystem("memory")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_urls_are_told_from_paths():
    assert parse_location("s3://bucket/a.tar") == RemoteFile("s3://bucket/a.tar")
    assert parse_location("zip::s3://bucket/a.zip") == RemoteFile("zip::s3://bucket/a.zip")
    for text in ("a.tar", "/data/a.tar", "a:b/c", "./x", "s3:/bucket"):
        assert parse_location(text) == Path(text)


@pytest.mark.parametrize(
    ("url", "place", "beside", "parent"),
    [
        ("s3://b/x/a.tar", "/s3/b/x/a.tar", "s3://b/x/a.parquet", "s3://b/x/"),
        ("memory:///x/a.tar", "/memory/x/a.tar", "memory:///x/a.parquet", "memory:///x/"),
        ("https://h/x/a.tar?sig=1", "/https/h/x/a.tar", "https://h/x/a.parquet", "https://h/x/"),
        ("zip://x/a.tar::s3://b/c.zip", "/s3/b/c.zip/zip/x/a.tar", "zip://x/a.parquet::s3://b/c.zip", "zip://x/::s3://b/c.zip"),
    ],
)  # fmt: skip
def test_a_url_has_what_readers_use_of_a_path(url, place, beside, parent):
    file = RemoteFile(url)
    assert (file.name, file.suffix, file.path) == ("a.tar", ".tar", PurePosixPath(place))
    assert (file.with_suffix(".parquet").url, file.parent.url) == (beside, parent)


def test_messages_show_no_secrets():
    assert str(RemoteFile("https://me:pw@host/a.tar?X-Signature=1")) == "https://host/a.tar"
    assert str(RemoteFile("zip://a::ftp://me:pw@host/a.zip")) == "zip://a::ftp://host/a.zip"
    assert "pw" not in str(place_of(RemoteFile("ftp://me:pw@host/a.tar")))


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
    assert [is_file(one) for one in (file, folder, none)] == [True, False, False]
    assert [is_folder(one) for one in (file, folder, none)] == [False, True, False]
    assert [can_list(one) for one in (folder, RemoteFile("http://host/c"), Path("c"))] == [True, False, True]
    assert size_of(file) == 3
    assert [folder_of(one).url for one in (folder, file, RemoteFile("memory:///c/*.tar"))] == [
        "memory:///c",
        "memory:///c/",
        "memory:///c/",
    ]


@pytest.mark.parametrize("block", [16, 1000, 1 << 22])
def test_any_reads_give_the_bytes_of_the_file(bucket, monkeypatch, block):
    monkeypatch.setattr(remote, "_BLOCK", block)
    generator = np.random.default_rng(0)
    data = generator.bytes(5000)
    bucket.pipe("/a", data)
    reader = RangeReader(RemoteFile("memory:///a"))
    position = 0
    for _ in range(500):
        size = int(generator.integers(0, 200))
        position = position + size if generator.random() < 0.7 else int(generator.integers(0, 5200))
        assert reader.pread(size, position) == data[position : position + size]


@pytest.fixture
def requests(bucket, monkeypatch):
    """Sizes of what was asked for, with blocks of 10,000 bytes."""
    sizes: list[int] = []
    original = MemoryFileSystem.cat_file

    def cat_file(self, path, start=None, end=None, **options):
        sizes.append(end - start)
        return original(self, path, start=start, end=end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    monkeypatch.setattr(remote, "_BLOCK", 10_000)
    return sizes


def test_a_tar_is_read_in_few_requests_in_whatever_order_a_key_has_its_files(bucket, requests, tmp_path, make_tar):
    path = make_tar(tmp_path / "a.tar", [(f"{n}.{x}", bytes(100)) for n in range(50) for x in ("jpg", "json", "txt")])
    bucket.pipe("/a.tar", path.read_bytes())
    with TarReader(RemoteFile("memory:///a.tar")) as tar:
        members = list(tar.members())
        scanned = len(requests)
        for first in range(0, len(members), 3):
            for member in (members[first + 1], members[first + 2], members[first]):
                assert tar.read(member, 1000, "") == bytes(100)
    assert scanned <= 18
    assert len(requests) - scanned <= 19


def test_reading_here_and_there_takes_no_more_than_what_is_asked_for(bucket, requests):
    bucket.pipe("/a", bytes(1_000_000))
    reader = RangeReader(RemoteFile("memory:///a"))
    for position in range(950_000, 0, -50_000):
        reader.pread(100, position)
    assert requests == [100] * 19


def test_a_stream_reads_seeks_and_tells_as_a_file_does(bucket):
    data = bytes(range(256)) * 20
    bucket.pipe("/a", data)
    with open_stream(RemoteFile("memory:///a")) as stream:
        assert stream.read(3) == data[:3]
        assert stream.seek(-5, io.SEEK_END) == len(data) - 5
        assert stream.read() == data[-5:]
        stream.seek(10)
        stream.seek(5, io.SEEK_CUR)
        assert (stream.tell(), stream.read(2)) == (15, data[15:17])
        assert stream.seekable()


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
def failing(bucket, monkeypatch):
    """Make reads fail: failing(error, times)."""
    original = MemoryFileSystem.cat_file
    calls = []

    def fail(error, times):
        def cat_file(self, *arguments, **options):
            calls.append(arguments)
            if len(calls) <= times:
                raise error
            return original(self, *arguments, **options)

        monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
        return calls

    bucket.pipe("/a", b"content")
    return fail


def test_a_read_that_fails_is_tried_again(failing):
    calls = failing(TimeoutError("slow"), 3)
    assert RangeReader(RemoteFile("memory:///a")).pread(7, 0) == b"content"
    assert len(calls) == 4


def test_a_read_that_goes_on_failing_is_a_storage_error(failing):
    failing(ValueError("of a driver"), 99)
    with pytest.raises(
        StorageError, match=r"URL cannot be read, tried 4 times: ValueError of a driver \(memory:///a\)"
    ):
        RangeReader(RemoteFile("memory:///a")).pread(7, 0)


@pytest.mark.parametrize(
    ("error", "message"),
    [(PermissionError("no"), "access denied: PermissionError no"), (FileNotFoundError("a"), "file is gone")],
)
def test_what_no_second_try_mends_is_told_at_once(failing, error, message):
    calls = failing(error, 99)
    with pytest.raises(StorageError, match=message):
        RangeReader(RemoteFile("memory:///a")).pread(7, 0)
    assert len(calls) == 1


def test_a_web_server_that_cannot_be_reached_is_no_missing_file(failing, monkeypatch):
    missing = FileNotFoundError("http://host/a")
    missing.__cause__ = ConnectionError("refused")
    calls = failing(missing, 99)
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda _: (fsspec.filesystem("memory"), "/a"))
    store = RemoteStore(RemoteFile("http://host/a"))
    with pytest.raises(StorageError, match="URL cannot be read, tried 4 times: ConnectionError refused"):
        store.read(0, 7, 7)
    assert len(calls) == 4
    missing.__cause__ = None
    with pytest.raises(StorageError, match="file is gone"):
        store.read(0, 7, 7)


def test_a_server_without_ranges_is_read_all_the_same(bucket, monkeypatch):
    bucket.pipe("/a", b"0123456789")
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path, **_: b"0123456789")
    assert RemoteStore(RemoteFile("memory:///a")).read(2, 5, 10) == b"234"


def test_an_object_that_has_become_shorter_is_an_error(bucket):
    bucket.pipe("/a", b"0123")
    with pytest.raises(StorageError, match="4 bytes came instead of 10"):
        RangeReader(RemoteFile("memory:///a", size=10)).pread(10, 0)


def test_a_server_that_tells_no_size_is_named(bucket, monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path, **_: {"name": path, "size": None, "type": "file"})
    with pytest.raises(StorageError, match="does not say how large the file is"):
        size_of(RemoteFile("memory:///a"))


def test_a_missing_driver_is_named_with_its_package(monkeypatch):
    def url_to_fs(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", url_to_fs)
    with pytest.raises(ConfigError, match=r"s3:// needs a package .*\(s3://b/a.tar\); fix: pip install s3fs"):
        is_file(RemoteFile("s3://b/a.tar"))


def test_an_unknown_scheme_and_a_wrong_pattern_are_named(bucket):
    with pytest.raises(ConfigError, match="URL cannot be used: Protocol not known: bla"):
        is_file(RemoteFile("bla://b/a.tar"))
    with pytest.raises(ConfigError, match="URL cannot be used: Invalid pattern"):
        list_location(RemoteFile("memory:///c/**.tar"), ())


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


def mmc4_job(tokenizer_path, output, *, inputs, images, share=None) -> PrepareJob:
    source = InterleavedSource(find_record_files(inputs), InterleavedRules())
    part = PartJob(source=source, recipe=Recipe(join=JoinRules()), tokenizer=tokenizer_path, images=images)
    return PrepareJob(output=output, source_name="mmc4", part=part, share=share)


def coyo_job(tokenizer_path, output, *inputs, share=None) -> PrepareJob:
    part = PartJob(source=find_pair_source(inputs, PairRules()), recipe=Recipe(), tokenizer=tokenizer_path)
    return PrepareJob(output=output, source_name="coyo", part=part, share=share)


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


def test_parts_joined_with_a_table_at_a_url_are_merged(coyo, bucket, tokenizer_path, tmp_path):
    copy_to(bucket, coyo)
    whole = RemoteFile("memory:///coyo")
    prepare(coyo_job(tokenizer_path, tmp_path / "whole", whole))
    for number in (1, 2):
        prepare(coyo_job(tokenizer_path, tmp_path / f"part{number}", whole, share=Share(number, 2)))
    merge_datasets(tmp_path / "merged", [tmp_path / "part1", tmp_path / "part2"])
    assert content(tmp_path / "whole") == content(tmp_path / "merged")


def test_two_stores_in_one_dataset_keep_their_files_apart(bucket, make_lines, tokenizer_path, tmp_path, mmc4):
    copy_to(bucket, mmc4)
    inputs = (mmc4, RemoteFile("memory:///mmc4"))
    prepare(mmc4_job(tokenizer_path, tmp_path / "a", inputs=inputs, images=ImagePlace(folder=mmc4 / "images")))
    manifest = load_manifest(tmp_path / "a")
    assert manifest.documents == 12
    assert len(manifest.options["inputs"]) == 4
