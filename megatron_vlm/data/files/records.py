"""Records from JSON lines and JSON arrays, plain, .gz or .zip, in bounded memory; a bad record affects no other."""

import errno
import functools
import gzip
import io
import json
import lzma
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, BinaryIO, NamedTuple, cast

from megatron_vlm.config.prepare import MAX_RECORD_BYTES
from megatron_vlm.data.files.locations import Location
from megatron_vlm.data.rejects import RejectError

SUFFIXES = tuple(kind + packed for packed in ("", ".gz", ".zip") for kind in (".jsonl", ".ndjson", ".json"))

_BLOCK_BYTES, _SMALL_BLOCK_BYTES = 1 << 20, 1 << 16
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
# Errors of unpacking; RuntimeError: a zip with a password or an unknown compression.
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, RuntimeError)
# The pattern skips whole strings, so Python takes one step per bracket and not one per string. A comma outside all
# brackets ends an element. A single quote is found if its string continues beyond the bytes read so far.
_STRING = rb'"[^"\\\n]*(?:\\[^\n][^"\\\n]*)*"'
_OUTER_TOKEN = re.compile(rb'["{}\[\],]')
_INNER_TOKEN = re.compile(rb'(?:[^"{}\[\]]*' + _STRING + rb'){0,50}[^"{}\[\]]*["{}\[\]]')
_STRING_REST = re.compile(rb'[^"\\\n]*(?:\\[^\n][^"\\\n]*)*')
_OPENING = {ord("}"): ord("{"), ord("]"): ord("[")}


class Record(NamedTuple):
    """One record or row of a file, or why it cannot be read."""

    line: int
    """Line of the file where the record starts, or row; from 1."""
    value: dict[str, Any] | RejectError


def read_records(path: Location, *, max_bytes: int = MAX_RECORD_BYTES) -> Iterator[Record]:
    """Read the records of one file: an array if its first character is "[", otherwise one record per line.

    Args:
        path: JSON lines or a JSON array, plain or as .gz or .zip (all members, in order of their names).
        max_bytes: longest record; a longer one is rejected without being held in memory.

    Yields:
        A record, or a RejectError with reason json_syntax, json_nesting, json_duplicate_key, json_type,
        invalid_utf8, record_too_long or file_truncated.
    """
    for line, raw in read_raw_records(path, max_bytes=max_bytes):
        try:
            value = raw if isinstance(raw, RejectError) else parse_record(raw)
        except RejectError as error:
            value = error
        yield Record(line, value)


def read_raw_records(path: Location, *, max_bytes: int = MAX_RECORD_BYTES) -> Iterator[tuple[int, bytes | RejectError]]:
    """Find the records of one file without parsing them; see `read_records`.

    Yields:
        The line, and the bytes of the record or a RejectError with reason record_too_long or file_truncated.
    """
    openers = _openers(path)
    while True:
        line = 0
        try:
            if (opener := next(openers, None)) is None:
                return
            with closing(opener()) as stream:
                for line, raw in _split(_Unpacked(stream), max_bytes):  # noqa: B007
                    yield line, raw
        except _DAMAGE as error:  # the next member of a .zip may be whole
            yield line + 1, RejectError("file_truncated", f"{type(error).__name__}: {error}")


def field(record: dict[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """Return a field of a record.

    Raises:
        RejectError: it is missing or has another type.
    """
    if name not in record:
        raise RejectError("json_type", f"field {name} is missing")
    value = record[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise RejectError("json_type", f"field {name} is {type(value).__name__}, not {names}")
    return value


class _Unpacked:
    """A stream that returns everything before a damaged place, and only then raises the error."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = cast(io.BufferedReader, stream)
        self._error: Exception | None = None

    def read(self, size: int) -> bytes:
        """Read `size` bytes, or fewer at the end or before a damaged place."""
        blocks: list[bytes] = []
        while size and self._error is None:
            try:
                # read() would lose the blocks before a damaged one; read1() loses no more than one block.
                block = self._stream.read1(min(size, _SMALL_BLOCK_BYTES))
            except _DAMAGE as error:
                self._error = error
            except OSError as error:
                # bzip2 in a .zip reports damage as an OSError without errno; errors of a disk have one.
                if error.errno is not None:
                    raise
                self._error = EOFError(str(error))
            else:
                if not block:
                    break
                blocks.append(block)
                size -= len(block)
        if self._error is not None and not blocks:
            raise self._error
        return b"".join(blocks)


def _openers(path: Location) -> Iterator[Callable[[], BinaryIO]]:
    """Yield a function that opens each stream of records in a file."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        with path.open("rb") as packed:
            yield functools.partial(_opened_gzip, packed)
    elif suffix == ".zip":
        with path.open("rb") as packed, _opened_zip(zipfile.ZipFile, packed) as archive:
            for member in sorted(archive.infolist(), key=lambda member: member.filename):
                if not member.is_dir():
                    yield functools.partial(_opened_zip, archive.open, member)
    else:
        yield lambda: path.open("rb")


def _opened_gzip(packed: BinaryIO) -> BinaryIO:
    if not cast(io.BufferedReader, packed).peek(1):
        raise EOFError("the file is empty, which is not a packed file")
    return cast(BinaryIO, gzip.open(packed, "rb"))


def _opened_zip(opener: Callable, argument: Any) -> Any:
    """Open a zip, or a member of one; all errors other than those of the disk count as damage.

    Raises:
        BadZipFile: it is damaged.
    """
    try:
        return opener(argument)
    except (ValueError, struct.error) as error:  # a member name that cannot be decoded
        raise zipfile.BadZipFile(str(error)) from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # an offset before the beginning of the file
            raise
        raise zipfile.BadZipFile(f"an offset outside the file: {error.strerror}") from None


def _split(stream: _Unpacked, max_bytes: int) -> Iterator[tuple[int, bytes | RejectError]]:
    """Yield the raw bytes of each record and its line."""
    head = stream.read(_BLOCK_BYTES).removeprefix(_BOM)
    splitter: Callable = _split_array if head.lstrip(_BLANK).startswith(b"[") else _split_lines
    return splitter(head, stream, max_bytes)


def _split_lines(head: bytes, stream: _Unpacked, max_bytes: int) -> Iterator[tuple[int, bytes | RejectError]]:
    number, pending = 0, head
    skipped = 0  # bytes of a too long line that are already dropped
    while pending or skipped:
        *lines, rest = pending.split(b"\n")
        for raw in lines:
            number += 1
            if skipped + len(raw) > max_bytes:
                yield number, too_long(skipped + len(raw), max_bytes)
            elif raw.strip(_BLANK):
                yield number, raw
            skipped = 0
        if skipped + len(rest) > max_bytes:
            skipped, rest = skipped + len(rest), b""
        chunk = stream.read(max(_BLOCK_BYTES, len(rest)))
        if not chunk:
            if skipped:
                yield number + 1, too_long(skipped, max_bytes)
            elif rest.strip(_BLANK):
                yield number + 1, rest
            return
        pending = rest + chunk


def too_long(size: int, max_bytes: int) -> RejectError:
    """Return the reason why a record of `size` bytes is rejected."""
    return RejectError("record_too_long", f"{size} bytes, the limit is {max_bytes}")


class _ArrayScanner:
    """Find the borders of the elements of a JSON array without parsing them."""

    def __init__(self) -> None:
        self._stack = bytearray(b"[")
        self._in_string = False

    @property
    def finished(self) -> bool:
        """Whether the closing bracket of the array was found."""
        return not self._stack

    def scan(self, buffer: bytes, position: int) -> tuple[int, bool]:
        """Continue to the end of the current element.

        Returns:
            Position of the comma or bracket that ends it, and True; or where to continue with more bytes, and False.
        """
        while position < len(buffer):
            if self._in_string:
                position = _STRING_REST.match(buffer, position).end()  # type: ignore[union-attr]
                if position >= len(buffer) - 1 and buffer[position:] in (b"", b"\\"):
                    return position, False
                self._in_string = False
                position += 1  # the quote that ends it, or a line break, which a string cannot contain
            match = (_OUTER_TOKEN if len(self._stack) == 1 else _INNER_TOKEN).search(buffer, position)
            if match is None:
                break
            position = match.end()
            token = buffer[position - 1]
            if token == ord('"'):
                self._in_string = True
            elif token in b"{[":
                self._stack.append(token)
            elif token == ord(",") or self._close(token):
                return position - 1, True
        return len(buffer), False

    def _close(self, token: int) -> bool:
        """Close up to the last matching bracket, so that a missing one affects only one element."""
        at = self._stack.rfind(_OPENING[token])
        if at == 0 and len(self._stack) > 1 and token == ord("]"):
            # The array would end inside an element: true at the end of the file, otherwise a stray bracket.
            at = -1
        if at >= 0:
            del self._stack[at:]
        return not self._stack


def _split_array(head: bytes, stream: _Unpacked, max_bytes: int) -> Iterator[tuple[int, bytes | RejectError]]:
    scanner = _ArrayScanner()
    opening = head.index(b"[") + 1
    line = 1 + head.count(b"\n", 0, opening)
    # buffer[begin:position] is the current element as far as it was read; `skipped` bytes of it are already dropped.
    buffer, begin, position, skipped = head, opening, opening, 0
    start = line
    while not scanner.finished:
        position, found = scanner.scan(buffer, position)
        if not found:
            if skipped + position - begin > max_bytes:
                start = start if skipped else line + _leading_breaks(buffer[begin:position])
                skipped += position - begin
                line += buffer.count(b"\n", begin, position)
                begin = position
            if not (chunk := stream.read(_BLOCK_BYTES)):
                break
            buffer, position, begin = buffer[begin:] + chunk, position - begin, 0
            continue
        raw = buffer[begin:position]
        start = start if skipped else line + _leading_breaks(raw)
        if skipped + len(raw) > max_bytes:
            yield start, too_long(skipped + len(raw), max_bytes)
        elif raw.strip(_BLANK):
            yield start, raw
        line += buffer.count(b"\n", begin, position + 1)
        begin, position, skipped = position + 1, position + 1, 0
    rest = (buffer[begin:] + stream.read(_BLOCK_BYTES)).strip(_BLANK)
    if not scanner.finished:
        yield line, RejectError("file_truncated", f"the array does not end; {skipped + len(rest)} bytes remain")
    elif rest:
        yield line, RejectError("json_syntax", f"the array ends here, but the file continues with {rest[:20]!r}")


def _leading_breaks(raw: bytes) -> int:
    return raw.count(b"\n", 0, len(raw) - len(raw.lstrip(_BLANK)))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise RejectError("json_duplicate_key", f"key {name[:100]!r} is given twice")
    return value


# Python writes NaN for a missing score, which is not JSON; like null, it is a value that is not there.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=lambda name: None)


def parse_record(raw: bytes) -> dict[str, Any]:
    """Parse one record; NaN and Infinity become None.

    Raises:
        RejectError: json_syntax, json_nesting, json_duplicate_key, json_type or invalid_utf8.
    """
    try:
        value = _DECODER.decode(raw.strip(_BLANK).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RejectError("invalid_utf8", f"byte 0x{raw[error.start]:02X} at {error.start} of the record") from None
    except RecursionError:
        raise RejectError("json_nesting", "brackets are nested too deeply") from None
    except ValueError as error:
        raise RejectError("json_syntax", str(error)[:200]) from None
    if not isinstance(value, dict):
        raise RejectError("json_type", f"the record is {type(value).__name__}, not an object")
    return value
