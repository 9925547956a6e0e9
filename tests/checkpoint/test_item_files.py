import io

import pytest
import torch

from megatron_vlm.checkpoint import item_files
from megatron_vlm.checkpoint.item_files import checksummed
from megatron_vlm.checkpoint.manifest import checksum_file
from tests.support.small_disk import files_of_at_most


def test_the_checksum_is_that_of_the_file(tmp_path):
    values = torch.randn(700_000)  # more than one block
    with checksummed(tmp_path / "ours") as stream:
        torch.save(values, stream)
        torch.save(values[:3].clone(), stream)
    assert stream.record == checksum_file(tmp_path / "ours")
    theirs = io.BytesIO()
    torch.save(values, theirs)
    assert (tmp_path / "ours").read_bytes().startswith(theirs.getvalue())


def write_three_tensors(path):
    with checksummed(path) as stream:
        for _ in range(3):
            torch.save(torch.randn(700_000), stream)


@pytest.mark.parametrize("limit", [0, 100, 100_000, 2_799_999])
def test_a_file_that_cannot_be_written_is_named_and_no_record_ends_the_process(tmp_path, limit):
    with files_of_at_most(limit), pytest.raises(OSError, match=r"\[Errno 27\] File too large: '.*/full'"):
        write_three_tensors(tmp_path / "full")


def test_a_stream_that_is_watched_gets_on_with_each_block_and_flushes_now_and_then(tmp_path, monkeypatch):
    flushed, blocks = [], []
    monkeypatch.setattr(item_files, "_BYTES_TO_FLUSH", 3 << 20)
    monkeypatch.setattr(item_files, "flush_to_disk", lambda file: flushed.append(len(blocks)))
    with checksummed(tmp_path / "file", lambda: blocks.append(1)) as stream:
        for _ in range(5):
            stream.write(bytes(2 << 20))
    assert len(blocks) == 10
    assert flushed == [3, 6, 9, 10]
