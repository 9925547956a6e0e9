from pathlib import PurePosixPath

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from megatron_vlm.config import ConfigError, StorageError
from megatron_vlm.data.files import remote
from megatron_vlm.data.files.locations import (
    RemoteFile,
    list_location,
    place_of,
    size_of,
)
from megatron_vlm.data.files.remote import RangeReader, RemoteStore
from megatron_vlm.data.files.tars import TarReader


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
    with pytest.raises(StorageError, match="4 bytes instead of 10"):
        RangeReader(RemoteFile("memory:///a", size=10)).pread(10, 0)


def test_a_server_that_tells_no_size_is_named(bucket, monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path, **_: {"name": path, "size": None, "type": "file"})
    with pytest.raises(StorageError, match="does not say how large the file is"):
        size_of(RemoteFile("memory:///a"))


def test_a_missing_driver_is_named_with_its_package(monkeypatch):
    def url_to_fs(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", url_to_fs)
    with pytest.raises(ConfigError, match=r"s3:// needs a package .*\(s3://b/a.tar\); fix: Install s3fs"):
        RemoteFile("s3://b/a.tar").is_file()


def test_an_unknown_scheme_and_a_wrong_pattern_are_named(bucket):
    with pytest.raises(ConfigError, match="URL cannot be used: Protocol not known: bla"):
        RemoteFile("bla://b/a.tar").is_file()
    with pytest.raises(ConfigError, match="URL cannot be used: Invalid pattern"):
        list_location(RemoteFile("memory:///c/**.tar"), ())
