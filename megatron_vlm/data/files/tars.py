"""Members of tar files, found by their headers and read by position.

A tar is scanned once, header by header; after that, each member takes one read. This is several times faster than
Python's tarfile, and matches members by name in any order.
"""

import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from megatron_vlm.data.files.locations import Location, RemoteFile
from megatron_vlm.data.files.remote import RangeReader
from megatron_vlm.data.rejects import RejectError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif")

_BLOCK = 512
_MAX_NAME_BYTES = 1 << 16
_REGULAR, _LONG_NAME, _PAX, _PAX_GLOBAL = b"0\0", b"L", b"x", b"g"
_OCTAL, _DECIMAL = re.compile(rb"[0-7]*"), re.compile(rb"[0-9]{1,20}")
_BASE_256 = 0x80  # first byte of a size above 8 GiB; 0xFF begins a negative one
_PADDING = bytes(1 << 20)


class Member(NamedTuple):
    """One file of a tar."""

    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        """Name up to the first dot after the folder; the files of one sample share it."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def extension(self) -> str:
        """The rest of the name after the key and its dot, in lower case."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()


class TarReader:
    """One open tar file, not compressed."""

    def __init__(self, path: Location) -> None:
        self._descriptor: int | None = None
        self._pread: Callable[[int, int], bytes]
        if isinstance(path, RemoteFile):
            reader = RangeReader(path)
            self._pread, self._size = reader.pread, reader.size
        else:
            self._descriptor = os.open(path, os.O_RDONLY)
            self._pread = functools.partial(os.pread, self._descriptor)
            self._size = os.fstat(self._descriptor).st_size

    def __enter__(self) -> "TarReader":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def read(self, member: Member, max_bytes: int, reason: str) -> bytes:
        """Return the content of a member.

        Raises:
            RejectError: it has more than `max_bytes`; carries the given reason.
        """
        if member.size > max_bytes:
            raise RejectError(reason, f"{member.size} bytes, at most {max_bytes} are allowed")
        return self._pread(member.size, member.offset)

    def members(self) -> Iterator[Member]:
        """Yield the regular files in order, including those of further tars appended to the file.

        A leading "./", which `tar cf shard.tar ./` writes, is not part of a name.

        Raises:
            RejectError: tar_damaged or tar_truncated, after all members before the damaged place.
        """
        end = self._size
        position, long_name, long_size = 0, None, None
        while position < end:
            header = self._pread(_BLOCK, position)
            if len(header) == _BLOCK and not header.strip(b"\0"):
                position = self._skip_padding(position)
                if position >= end:
                    return
                long_name = long_size = None
                continue
            size = self._check(header, position)
            content, kind = position + _BLOCK, header[156:157]
            if kind in (_LONG_NAME, _PAX):
                if size > _MAX_NAME_BYTES:
                    raise RejectError("tar_damaged", f"name of {size} bytes at byte {content}")
                extra = self._pread(size, content)
                if kind == _LONG_NAME:
                    long_name = extra.rstrip(b"\0")
                else:
                    records = _pax_records(extra, content)
                    long_name, long_size = records.get(b"path") or long_name, _pax_size(records, content)
                position = content + -(-size // _BLOCK) * _BLOCK
                continue
            if kind != _PAX_GLOBAL and long_size is not None:
                size = long_size
            position = content + -(-size // _BLOCK) * _BLOCK
            if content + size > end:
                raise RejectError(
                    "tar_truncated", f"the member at byte {content} has {size} bytes, {end - content} are there"
                )
            if kind in _REGULAR:
                name = long_name or _header_name(header)
                yield Member(name.decode("utf-8", "surrogateescape").removeprefix("./"), content, size)
            if kind != _PAX_GLOBAL:
                long_name = long_size = None
        raise RejectError("tar_truncated", f"the file ends after {position} bytes without the end mark of a tar")

    def _check(self, header: bytes, position: int) -> int:
        """Return the size of the member whose header this is."""
        if len(header) < _BLOCK:
            raise RejectError("tar_truncated", f"the file ends within the header at byte {position}")
        expected = _octal(header[148:156])
        size = int.from_bytes(header[125:136], "big") if header[124] == _BASE_256 else _octal(header[124:136])
        if expected is None or size is None:
            raise RejectError("tar_damaged", f"no tar header at byte {position}")
        if sum(header) - sum(header[148:156]) + 8 * 0x20 != expected:
            raise RejectError("tar_damaged", f"the header at byte {position} does not match its checksum")
        return size

    def _skip_padding(self, position: int) -> int:
        """Return the position of the next block that is not all zeros, or of the end of the file."""
        while chunk := self._pread(len(_PADDING), position):
            if chunk != _PADDING[: len(chunk)]:
                return position + (len(chunk) - len(chunk.lstrip(b"\0"))) // _BLOCK * _BLOCK
            position += len(chunk)
        return position


def list_members(tar: TarReader) -> tuple[list[Member], RejectError | None]:
    """Return the regular files up to the first damaged place, and the error there; None if the tar is complete."""
    members: list[Member] = []
    try:
        members.extend(tar.members())
    except RejectError as error:
        return members, error
    return members, None


def group_members(members: Iterable[Member]) -> dict[str, dict[str, Member | None]]:
    """Return the members of each key by extension, in order of first appearance; None for a name that occurs twice."""
    groups: dict[str, dict[str, Member | None]] = {}
    for member in members:
        group, extension = groups.setdefault(member.key, {}), member.extension
        group[extension] = None if extension in group else member
    return groups


def find_image(group: dict[str, Member | None]) -> Member | None:
    """Return the image among the members of a key, by extension; None if it is missing or occurs twice."""
    for extension in IMAGE_EXTENSIONS:
        if extension in group:
            return group[extension]
    return None


def _header_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _octal(digits: bytes) -> int | None:
    """Return a number of a header, or None if it is invalid; int() would accept signs and underscores."""
    digits = digits.strip(b"\0 ")
    return int(digits or b"0", 8) if _OCTAL.fullmatch(digits) else None


def _pax_records(content: bytes, position: int) -> dict[bytes, bytes]:
    """Return the records `<length> <name>=<value>`, each ended by a line break; values may contain line breaks."""
    records: dict[bytes, bytes] = {}
    start = 0
    while start < len(content) and content[start]:
        digits, blank, _ = content[start : start + 21].partition(b" ")
        length = int(digits) if blank and _DECIMAL.fullmatch(digits) else 0
        name, equals, value = content[start + len(digits) + 1 : start + length].partition(b"=")
        if start + length > len(content) or not equals or not value.endswith(b"\n"):
            raise RejectError("tar_damaged", f"invalid extended header at byte {position + start}")
        records[name] = value[:-1]
        start += length
    return records


def _pax_size(records: dict[bytes, bytes], position: int) -> int | None:
    """Return the size of a member that is too large for its header."""
    size = records.get(b"size")
    if size is not None and not _DECIMAL.fullmatch(size):
        raise RejectError("tar_damaged", f"the extended header at byte {position} has an invalid size")
    return None if size is None else int(size)
