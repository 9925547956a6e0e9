"""Write tensors and objects to a file of a torch distributed checkpoint, and compute its checksum on the way."""

import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import SavePlan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_vlm.checkpoint.manifest import FileRecord
from megatron_vlm.platform.files.durable import flush_to_disk
from megatron_vlm.platform.files.uncached import STEP_BYTES, UncachedFile

NUM_FILES = 2
"""Files of a rank; the default of megatron-core's writer."""
_BLOCK_BYTES = 1 << 20
"""A block is still in the processor's cache when it is written after its checksum was computed. Larger ones take the
system's cache up to four times as long."""
_BYTES_TO_FLUSH = 1 << 30
"""Written between two flushes of a stream that somebody watches: no flush is long enough to look like a hang."""


class ChecksummedStream:
    """A file that is being written.

    `write` never raises: torch's zip writer, which calls it, ends the process if its last records fail in a destructor.
    The first error is kept, what follows it is dropped, and `check` raises it.

    Args:
        file: open for writing.
        get_on: called after each block; None: nobody watches.
    """

    def __init__(self, file: BinaryIO | UncachedFile, get_on: Callable[[], object] | None = None) -> None:
        self._file, self._size, self._crc32, self._get_on = file, 0, 0, get_on
        self._flush_at = _BYTES_TO_FLUSH
        self._block_bytes = STEP_BYTES if isinstance(file, UncachedFile) else _BLOCK_BYTES
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write a buffer of bytes and return their number."""
        view = memoryview(data).cast("B")
        size = self._size
        for begin in range(0, len(view), self._block_bytes):
            if self._error is not None:
                break
            block = view[begin : begin + self._block_bytes]
            self._crc32 = zlib.crc32(block, self._crc32)
            try:
                self._file.write(block)
                if self._get_on is not None:
                    self._flush_sometimes(size + begin)
                    self._get_on()
            except OSError as error:
                self._error = error
        self._size += len(view)
        return len(view)

    def _flush_sometimes(self, size: int) -> None:
        if size >= self._flush_at:
            flush_to_disk(self._file)
            self._flush_at = size + _BYTES_TO_FLUSH

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Do nothing: `checksummed` flushes once, at the end."""

    def check(self) -> None:
        """Raise the error of an earlier `write`, if there was one."""
        if self._error is not None:
            raise self._error

    @property
    def record(self) -> FileRecord:
        """Size and checksum of what was written so far."""
        return FileRecord(self._size, self._crc32)


@contextmanager
def checksummed(
    path: Path, get_on: Callable[[], object] | None = None, *, is_cached: bool = True
) -> Iterator[ChecksummedStream]:
    """Create a file, and flush it to the disk when the block ends without an error.

    Args:
        path: does not exist.
        get_on: called after each block that was written; None: nobody watches.
        is_cached: False: write past the system's cache.

    Raises:
        OSError: it cannot be written; names the file.
    """
    try:
        with path.open("wb") if is_cached else UncachedFile(path) as file:
            stream = ChecksummedStream(file, get_on)
            yield stream
            stream.check()
            flush_to_disk(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_item(stream: ChecksummedStream, name: str, item: WriteItem, value: Tensor | io.BytesIO) -> WriteResult:
    """Append a tensor, or an object that is pickled already, to the file `name`; return where it is.

    Raises:
        OSError: the file cannot be written.
    """
    begin = stream.tell()
    if isinstance(value, io.BytesIO):
        stream.write(value.getbuffer())
    else:
        value = value.detach().cpu()
        # torch.save writes the whole storage behind a view.
        whole = value.untyped_storage().nbytes() == value.nbytes
        torch.save(value if whole else value.clone(), cast(BinaryIO, stream))
    stream.check()
    length = stream.tell() - begin
    return WriteResult(item.index, length, _StorageInfo(name, begin, length))


def write_items(
    path: Path,
    items: Sequence[WriteItem],
    resolve: Callable[[WriteItem], Tensor | io.BytesIO],
    get_on: Callable[[], object] | None = None,
) -> tuple[list[WriteResult], FileRecord]:
    """Write the file `path`.

    Args:
        path: does not exist.
        items: what goes into it, in this order.
        resolve: returns the value of an item.
        get_on: as in `checksummed`.

    Returns:
        Where each item is, and size and checksum of the file.

    Raises:
        OSError: it cannot be written; names the file.
    """
    with checksummed(path, get_on) as stream:
        results = [write_item(stream, path.name, item, resolve(item)) for item in items]
    return results, stream.record


def split_items(plan: SavePlan) -> list[list[WriteItem]]:
    """Distribute items over at most NUM_FILES files of about the same size: objects first, then the largest tensors."""
    buckets: list[list[WriteItem]] = [[] for _ in range(NUM_FILES)]
    sizes = [0] * NUM_FILES
    objects = [item for item in plan.items if item.type == WriteItemType.BYTE_IO]
    tensors = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
    for number, item in enumerate(objects):
        buckets[number % NUM_FILES].append(item)
    for item in sorted(tensors, key=_num_bytes, reverse=True):
        smallest = sizes.index(min(sizes))
        buckets[smallest].append(item)
        sizes[smallest] += _num_bytes(item)
    return [bucket for bucket in buckets if bucket]


def _num_bytes(item: WriteItem) -> int:
    data = item.tensor_data
    assert data is not None
    return data.chunk.sizes.numel() * data.properties.dtype.itemsize
