"""Files of this machine and of object stores by one type: a path, or any URL that fsspec reads.

Paths are read with plain system calls; fsspec is imported for URLs alone. Nothing is read over a network unless the
user names a URL. Reads of URLs go through one function that tries again, so that a store that hiccups for a second
costs a second, not a preparation of days.
"""

import dataclasses
import glob
import io
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast

from megatron_vlm.config import ConfigError, StorageError, UserError

_Result = TypeVar("_Result")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_PASSWORD = re.compile("^[^/@]*:[^/@]*@")
_QUERY_SCHEMES = ("http", "https")
_STATUS_MISSING = (404, 410)
_DRIVERS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
    "oss": "ossfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
}
_WAIT_SECONDS = (0.3, 1.0, 3.0)  # on top of what the drivers themselves try again
# One request of this size takes about as long as it waits for its first byte, and 64 open tars stay below 256 MiB.
_BLOCK, _KEPT_BLOCKS = 2 << 20, 2
_STREAM_BUFFER = 1 << 20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file, folder or pattern at a URL; has what readers use of a `Path`.

    Args:
        url: any URL of fsspec, chains such as `zip://a.jsonl::s3://bucket/docs.zip` included.
        size: known from a listing [bytes]; None: it is asked for when it is needed.
    """

    url: str
    size: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        """Return the URL without what may be a secret: the query of a signed URL, a password."""
        return "::".join(self._shown(link) for link in self.url.split("::"))

    @property
    def scheme(self) -> str:
        """What stands before the first colon."""
        return re.split("://|::", self.url, maxsplit=1)[0].lower()

    @property
    def path(self) -> PurePosixPath:
        """What the URL names within its store, bucket or host first; of a chain, the innermost archive first."""
        links = []
        for link in self.url.split("::"):
            scheme, _, path = self._shown(link).rpartition("://")
            links.append(PurePosixPath(scheme.lower(), path.strip("/")))
        return PurePosixPath("/", *reversed(links))

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.name

    @property
    def suffix(self) -> str:
        """Last suffix of the name, with its dot."""
        return self.path.suffix

    @property
    def is_pattern(self) -> bool:
        """Whether the URL stands for all that match it."""
        first = self.url.partition("::")[0]
        return "*" in first or "[" in first

    def with_suffix(self, suffix: str) -> "RemoteFile":
        """Return the file beside this one whose name ends otherwise."""
        return self._with_name(PurePosixPath(self.name).with_suffix(suffix).name)

    @property
    def parent(self) -> "RemoteFile":
        """The folder that the file is in."""
        return self._with_name("")

    def _with_name(self, name: str) -> "RemoteFile":
        first, chain, rest = self.url.partition("::")
        folder, slash, _ = first.rstrip("/").rpartition("/")
        return RemoteFile(f"{folder}{slash}{name}{chain}{rest}")

    @staticmethod
    def _shown(link: str) -> str:
        scheme, mark, path = link.rpartition("://")
        path = path.partition("?")[0] if scheme.lower() in _QUERY_SCHEMES else path
        return scheme + mark + _PASSWORD.sub("", path)


Location = Path | RemoteFile
"""Where a file is."""


def parse_location(text: str) -> Location:
    """Return a path, or what a URL names; nothing is looked at."""
    return RemoteFile(text) if _URL.match(text) else Path(text)


def absolute(location: Location) -> str:
    """Return the text that finds the file again from any working directory."""
    return location.url if isinstance(location, RemoteFile) else str(location.resolve())


def place_of(location: Location) -> PurePosixPath:
    """Return an absolute path that names the file among all others; two of one folder differ in their last part."""
    return location.path if isinstance(location, RemoteFile) else PurePosixPath(location.resolve())


def size_of(location: Location) -> int:
    """Return the size of a file [bytes].

    Raises:
        StorageError: it cannot be found out.
    """
    if not isinstance(location, RemoteFile):
        return location.stat().st_size
    if location.size is not None:
        return location.size
    size = RemoteStore(location).info()["size"]
    if size is None:
        raise StorageError(
            "the server does not say how large the file is", where=str(location), fix="copy it to a disk or a bucket"
        )
    return int(size)


def is_file(location: Location) -> bool:
    """Tell whether there is a file."""
    if not isinstance(location, RemoteFile):
        return location.is_file()
    try:
        return RemoteStore(location).info()["type"] == "file"
    except FileNotFoundError:
        return False


def is_folder(location: Location) -> bool:
    """Tell whether there is a folder; of a web server, which has none, always true."""
    if not isinstance(location, RemoteFile):
        return location.is_dir()
    if location.scheme in _QUERY_SCHEMES:
        return True
    try:
        return RemoteStore(location).info()["type"] == "directory"
    except FileNotFoundError:
        return False


def can_list(folder: Location) -> bool:
    """Tell whether the files of a folder are known; a web server need not tell them."""
    return not isinstance(folder, RemoteFile) or folder.scheme not in _QUERY_SCHEMES


def folder_of(location: Location) -> Location:
    """Return the location itself if it is a folder, else the folder that it is in."""
    if isinstance(location, RemoteFile) and (location.is_pattern or location.scheme in _QUERY_SCHEMES):
        return location.parent
    return location if is_folder(location) else location.parent


def list_location(location: Location, suffixes: tuple[str, ...], option: str = "--input") -> list[Location]:
    """Return the file itself, the files directly inside of a folder with one of `suffixes`, or what a pattern matches.

    Raises:
        ConfigError: there is nothing of this name; `option` is where the user gave it.
    """
    if isinstance(location, RemoteFile):
        return list(_list_remote(location, suffixes, option))
    if location.is_dir():
        found = sorted(entry for entry in location.iterdir() if entry.name.lower().endswith(suffixes))
        return [path for path in found if path.is_file()]
    if location.exists():
        return [location] if location.is_file() else []
    if not glob.has_magic(str(location)):
        raise _missing(location, option)
    matching = [path for path in map(Path, sorted(glob.glob(str(location), recursive=True))) if path.is_file()]
    if not matching:
        raise _unmatched(location, option)
    return list(matching)


def _missing(location: Location, option: str) -> ConfigError:
    return ConfigError(f"{option.strip('-')} does not exist", where=str(location), fix=f"check {option}")


def _unmatched(location: Location, option: str) -> ConfigError:
    return ConfigError(f"no file matches {option}", where=str(location), fix="check the pattern")


def _list_remote(location: RemoteFile, suffixes: tuple[str, ...], option: str) -> list[RemoteFile]:
    store = RemoteStore(location)
    try:
        if location.is_pattern:
            entries = store.glob()
        elif location.url.endswith("/") or store.info()["type"] == "directory":
            entries = [entry for entry in store.entries() if entry["name"].lower().endswith(suffixes)]
        else:
            return [dataclasses.replace(location, size=store.info()["size"])]
    except FileNotFoundError:
        raise _missing(location, option) from None
    if location.is_pattern and not entries:
        raise _unmatched(location, option)
    files = [RemoteFile(store.url_of(entry["name"]), entry["size"]) for entry in entries if entry["type"] == "file"]
    return sorted(files, key=lambda file: file.url)


class RemoteStore:
    """The file system behind a URL; every call is tried again if it fails, except for what no second try mends.

    Args:
        location: a file, folder or pattern.

    Raises:
        ConfigError: the scheme is unknown, or needs a package that is not installed.
        FileNotFoundError: an archive of the chain does not exist.
    """

    def __init__(self, location: RemoteFile) -> None:
        self._location = location
        self._system, self._path = self._attempt(self._open)

    def info(self) -> dict[str, Any]:
        """Return name, size and type ("file" or "directory").

        Raises:
            FileNotFoundError: there is none.
        """
        return self._attempt(lambda: self._system.info(self._path))

    def entries(self) -> list[dict[str, Any]]:
        """Return `info` of everything in the folder."""
        return self._attempt(lambda: self._system.ls(self._path, detail=True))

    def glob(self) -> list[dict[str, Any]]:
        """Return `info` of everything that matches the pattern.

        Raises:
            ConfigError: it is no pattern.
        """

        def match() -> list[dict[str, Any]]:
            try:
                return list(self._system.glob(self._path, detail=True).values())
            except ValueError as error:
                raise self._wrong(error) from None

        return self._attempt(match)

    def url_of(self, name: str) -> str:
        """Return the URL of a name that this file system gave."""
        _, chain, rest = self._location.url.partition("::")
        return self._system.unstrip_protocol(name) + chain + rest

    def read(self, start: int, end: int, size: int) -> bytes:
        """Return a piece of the file.

        Args:
            start: first byte.
            end: one after the last byte; not beyond `size`.
            size: of the whole file.

        Raises:
            StorageError: it cannot be read, or has become shorter.
        """

        def fetch() -> bytes:
            data = self._system.cat_file(self._path, start=start, end=end)
            if len(data) == size > end - start:  # a web server that knows no ranges sends everything
                data = data[start:end]
            if len(data) != end - start:
                raise OSError(f"{len(data)} bytes came instead of {end - start}")
            return data

        try:
            return self._attempt(fetch)
        except FileNotFoundError:
            raise self._gone() from None

    def read_inside(self, name: str, max_bytes: int) -> bytes | int:
        """Return the file `name` inside of this folder, or its size if that is more than `max_bytes`.

        Raises:
            FileNotFoundError: there is none, or it is a folder.
        """
        path = f"{self._path.rstrip('/')}/{name}"
        found = self._attempt(lambda: self._system.info(path))
        if found["type"] != "file":
            raise FileNotFoundError(name)
        if (size := found["size"] or 0) > max_bytes:
            return int(size)
        data = self._attempt(lambda: self._system.cat_file(path))
        return data if len(data) <= max_bytes else len(data)

    def _open(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs  # takes a tenth of a second, which local files need not pay

        try:
            return url_to_fs(self._location.url)
        except ImportError as error:
            scheme = self._location.scheme
            package = _DRIVERS.get(scheme, f"the package that fsspec names: {error}")
            raise ConfigError(
                f"{scheme}:// needs a package that is not installed",
                where=str(self._location),
                fix=f"pip install {package}",
            ) from None
        except ValueError as error:
            raise self._wrong(error) from None

    def _attempt(self, function: Callable[[], _Result]) -> _Result:
        for wait in (*_WAIT_SECONDS, None):
            try:
                return function()
            except UserError:
                raise
            except (IsADirectoryError, NotADirectoryError) as error:
                raise FileNotFoundError(str(error)) from None
            except PermissionError as error:
                raise StorageError(
                    f"access denied: {_brief(error)}", where=str(self._location), fix="check your credentials"
                ) from error
            except Exception as error:  # each driver has errors of its own
                if isinstance(error, FileNotFoundError) and not self._is_unreachable(error):
                    raise
                if wait is None:
                    raise StorageError(
                        f"URL cannot be read, tried {len(_WAIT_SECONDS) + 1} times: {_brief(error)}",
                        where=str(self._location),
                        fix="check network and credentials, then run the same command again",
                    ) from error
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _is_unreachable(self, error: FileNotFoundError) -> bool:
        """Tell whether it is the server that was not found: over HTTP, fsspec says of that too that the file is."""
        cause = error.__cause__
        return (
            self._location.scheme in _QUERY_SCHEMES
            and cause is not None
            and getattr(cause, "status", None) not in _STATUS_MISSING
        )

    def _wrong(self, error: ValueError) -> ConfigError:
        return ConfigError(f"URL cannot be used: {error}", where=str(self._location), fix="check it")

    def _gone(self) -> StorageError:
        return StorageError("file is gone", where=str(self._location), fix="check the bucket, then run again")


def _brief(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__} {error}"[:120]


class RangeReader:
    """Reads pieces of a file at a URL; where they are near each other, whole blocks, of which it keeps the last two.

    So a tar is read in few requests even though the files of a key are not read in their order, and a single image of
    another tar costs no more than itself.

    Args:
        file: what to read.
    """

    def __init__(self, file: RemoteFile) -> None:
        self.size = size_of(file)
        self._store = RemoteStore(file)
        self._blocks: dict[int, bytes] = {}
        self._end = 0  # of the last piece

    def pread(self, size: int, offset: int) -> bytes:
        """Return up to `size` bytes from `offset`; fewer only at the end of the file. As `os.pread`."""
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        near = abs(offset - self._end) <= _BLOCK
        self._end = offset + size
        first, last = offset // _BLOCK, (self._end - 1) // _BLOCK
        if last > first + 1 or not (near or (first in self._blocks and last in self._blocks)):
            return self._store.read(offset, self._end, self.size)
        start = offset - first * _BLOCK
        if first == last:
            return self._block(first)[start : start + size]
        return self._block(first)[start:] + self._block(last)[: self._end - last * _BLOCK]

    def _block(self, number: int) -> bytes:
        block = self._blocks.pop(number, None)
        if block is None:
            start = number * _BLOCK
            block = self._store.read(start, min(start + _BLOCK, self.size), self.size)
        self._blocks[number] = block
        if len(self._blocks) > _KEPT_BLOCKS:
            self._blocks.pop(next(iter(self._blocks)))
        return block


class _RemoteStream(io.RawIOBase):
    """A file at a URL as a stream that can seek, for parsers that want one."""

    def __init__(self, file: RemoteFile) -> None:
        self._reader = RangeReader(file)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._reader.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._reader.pread(len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_stream(location: Location) -> BinaryIO:
    """Open a file for reading from its beginning.

    Raises:
        OSError: the local file cannot be opened.
        StorageError: the URL cannot be read.
    """
    if not isinstance(location, RemoteFile):
        return location.open("rb")
    return cast(BinaryIO, io.BufferedReader(_RemoteStream(location), _STREAM_BUFFER))
