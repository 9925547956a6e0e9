import errno
import os

import pytest

from megatron_vlm.platform.files import uncached
from megatron_vlm.platform.files.durable import flush_to_disk
from megatron_vlm.platform.files.uncached import STEP_BYTES, UncachedFile, read_array, read_blocks
from tests.support.small_disk import files_of_at_most

CONTENT = os.urandom(STEP_BYTES + (3 << 20) + 4096 + 5)


@pytest.fixture(params=["past the cache", "no such flag", "refused at the start", "refused at the first block"])
def system(request, monkeypatch):
    """File systems that can go past the cache, and those that refuse it at different times."""
    opened, read, write = os.open, os.preadv, os.pwrite
    refused = OSError(errno.EINVAL, "Invalid argument")

    def unless_direct(call):
        def checked(descriptor, *args):
            if uncached.fcntl.fcntl(descriptor, uncached.fcntl.F_GETFL) & os.O_DIRECT:
                raise refused
            return call(descriptor, *args)

        return checked

    def open_cached(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise refused
        return opened(path, flags, *mode)

    if request.param == "no such flag":
        monkeypatch.setattr(uncached, "_O_DIRECT", 0)
    elif request.param == "refused at the start":
        monkeypatch.setattr(os, "open", open_cached)
    elif request.param == "refused at the first block":
        monkeypatch.setattr(os, "preadv", unless_direct(read))
        monkeypatch.setattr(os, "pwrite", unless_direct(write))


PLACES = [(0, None), (0, 1), (1, 4096), (4095, 4097), (4096, 8192), (1000, (5 << 20) + 7), (6 << 20, len(CONTENT))]


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize(("begin", "end"), PLACES)
def test_any_bytes_of_a_file_are_read(tmp_path, begin, end):
    (tmp_path / "file").write_bytes(CONTENT)
    assert b"".join(map(bytes, read_blocks(tmp_path / "file", begin, end))) == CONTENT[begin:end]
    end = end or len(CONTENT)
    assert read_array(tmp_path / "file", begin, end).tobytes() == CONTENT[begin:end]


def test_an_empty_file_has_no_blocks(tmp_path):
    (tmp_path / "file").touch()
    assert list(read_blocks(tmp_path / "file")) == []


@pytest.mark.parametrize("size", [0, 100, 4096, 5000])
def test_a_file_that_ends_too_early_is_told(tmp_path, size):
    (tmp_path / "file").write_bytes(CONTENT[:size])
    with pytest.raises(EOFError, match=f"it ends after {size} of 9000 bytes"):
        read_array(tmp_path / "file", 50, 9000)


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("order", [1, -1])
def test_what_is_written_in_any_order_is_the_file(tmp_path, order):
    ends = [0, 1, 1, 7, 4096, 4100, 4200, 9000, 20480, (1 << 20) + 3, 6 << 20, len(CONTENT)]
    with UncachedFile(tmp_path / "file") as file:
        for begin, end in list(zip(ends, ends[1:], strict=False))[::order]:
            file.seek(begin)
            assert file.write(CONTENT[begin:end]) == end - begin
        flush_to_disk(file)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_file_is_emptied_and_others_may_read_it(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    (tmp_path / "other").touch()
    with UncachedFile(tmp_path / "file") as file:
        flush_to_disk(file)
    assert (tmp_path / "file").stat().st_size == 0
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("limit", [0, 100, 4096, 100_000, (1 << 20) + 9])
def test_a_file_that_cannot_grow_is_an_error(tmp_path, limit):
    def write():
        with UncachedFile(tmp_path / "file") as file:
            file.write(CONTENT)
            flush_to_disk(file)

    with files_of_at_most(limit), pytest.raises(OSError, match="File too large"):
        write()


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="'.*/file'"):
        next(read_blocks(tmp_path / "file"))
