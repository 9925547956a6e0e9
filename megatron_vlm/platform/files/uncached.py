"""Read and write large files past the system's cache of pages, where the file system can do that.

Values that are used once gain nothing from the cache, and fresh pages for it can take the system longer than all other
work on them. What is read back comes from the disk and not from memory. The price is places and sizes that are
multiples of a block, which this module keeps to itself.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_vlm.platform.reused_memory import take_memory

_ALIGNMENT = 4096
"""Of memory, place and size [bytes]; what disks and file systems ask for is 512 or this."""
STEP_BYTES = 4 << 20
"""Read or written at a time through one buffer: enough for a disk to be busy, and little enough for the processor's
cache."""
_O_DIRECT = getattr(os, "O_DIRECT", 0)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | _O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _use_cache(descriptor: int, error: OSError) -> None:
    """Go on through the cache after an error that comes from going past it; raise any other one."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if error.errno != errno.EINVAL or not flags & _O_DIRECT:
        raise error
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_O_DIRECT)


def _read(descriptor: int, block: memoryview, begin: int) -> int:
    while True:
        try:
            return os.preadv(descriptor, [block], begin)
        except OSError as error:
            _use_cache(descriptor, error)


def read_blocks(path: Path, begin: int = 0, end: int | None = None) -> Iterator[memoryview]:
    """Yield the bytes of a file in blocks, each in the memory of the one before.

    Args:
        path: the file.
        begin: the first byte.
        end: the byte behind the last one; None: the end of the file, where reading stops in any case.
    """
    with _opened(path, os.O_RDONLY) as descriptor:
        end = os.fstat(descriptor).st_size if end is None else end
        buffer = take_memory(min(_room_for(begin, end), STEP_BYTES)).data
        place = begin - begin % _ALIGNMENT
        while place < end:
            length = _read(descriptor, buffer, place)
            block = buffer[max(begin - place, 0) : min(length, end - place)]
            if not block:
                return
            yield block
            place += length


def read_array(path: Path, begin: int, end: int) -> np.ndarray:
    """Return bytes of a file, uint8[end - begin].

    Args:
        path: the file.
        begin: the first byte.
        end: the byte behind the last one.

    Raises:
        EOFError: the file ends before.
        OSError: it cannot be read.
    """
    memory = take_memory(_room_for(begin, end))
    first = _read_into(memory.data, path, begin, end)
    return memory[first : first + end - begin]


def _read_into(memory: memoryview, path: Path, begin: int, end: int) -> int:
    """Read bytes of a file into memory; return where in the memory they begin.

    Args:
        memory: begins at a page and has `_room_for(begin, end)` bytes.
        path: as in `read_array`, like what follows.
        begin: likewise.
        end: likewise.
    """
    first = begin - begin % _ALIGNMENT
    place = 0
    with _opened(path, os.O_RDONLY) as descriptor:
        while first + place < end:
            length = _read(descriptor, memory[place:], first + place)
            if not length:
                raise EOFError(f"it ends after {first + place} of {end} bytes")
            place += length
    return begin - first


def _room_for(begin: int, end: int) -> int:
    """Return the bytes of memory that hold these bytes of a file in whole blocks."""
    first = begin - begin % _ALIGNMENT
    return -(-(end - first) // _ALIGNMENT) * _ALIGNMENT


class UncachedFile:
    """A new file, written at any places; each byte once.

    Blocks that are not yet full are kept in memory until they are, or until `flush`.

    Args:
        path: created, or emptied.
    """

    def __init__(self, path: Path) -> None:
        self._open = _opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._descriptor = self._open.__enter__()
        self._buffer = take_memory(STEP_BYTES).data
        self._unfinished: dict[int, tuple[bytearray, int]] = {}
        """Content of blocks, and how much of it is there, by their place."""
        self._size = self._place = 0

    def __enter__(self) -> "UncachedFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(None, None, None)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def seek(self, place: int) -> None:
        """Write on at this byte."""
        self._place = place

    def write(self, data: memoryview | bytes) -> int:
        """Write bytes and return their number."""
        view, begin = memoryview(data).cast("B"), self._place
        end = begin + len(view)
        first, last = -(-begin // _ALIGNMENT) * _ALIGNMENT, end // _ALIGNMENT * _ALIGNMENT
        if first > last:
            self._keep(begin, view)
        else:
            self._keep(begin, view[: first - begin])
            for place in range(first, last, STEP_BYTES):
                self._write_blocks(place, view[place - begin : min(place + STEP_BYTES, last) - begin])
            self._keep(last, view[last - begin :])
        self._place = end
        self._size = max(self._size, end)
        return len(view)

    def _keep(self, begin: int, part: memoryview) -> None:
        """Keep a part of a block until the block is full."""
        if not part:
            return
        inside = begin % _ALIGNMENT
        block, there = self._unfinished.pop(begin - inside, (bytearray(_ALIGNMENT), 0))
        block[inside : inside + len(part)] = part
        if there + len(part) == _ALIGNMENT:
            self._write_blocks(begin - inside, memoryview(block))
        else:
            self._unfinished[begin - inside] = block, there + len(part)

    def _write_blocks(self, place: int, blocks: memoryview) -> None:
        self._buffer[: len(blocks)] = blocks
        done = 0
        while done < len(blocks):
            try:
                done += os.pwrite(self._descriptor, self._buffer[done : len(blocks)], place + done)
            except OSError as error:
                _use_cache(self._descriptor, error)

    def flush(self) -> None:
        """Write the blocks that are not full; what is missing of them is zero."""
        for place, (block, _) in sorted(self._unfinished.items()):
            self._write_blocks(place, memoryview(block))
        os.ftruncate(self._descriptor, self._size)
