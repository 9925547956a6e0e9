"""Files at URLs, read by fsspec: with retries, in ranges, and with error messages that users understand.

fsspec is imported when the first URL is used. All reads go through one function that retries, so that an outage of a
second costs a second and not a preparation of days.
"""

import errno
import io
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast

from megatron_vlm.config import ConfigError, StorageError, UserError

_Result = TypeVar("_Result")
_WEB_SCHEMES = ("http", "https")
_STATUS_MISSING, _STATUS_DENIED = (404, 410), (401, 403)
# Secrets in the messages of drivers: anything after scheme and host of URLs, queries and user info anywhere.
_URL_TEXT = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s/?#]*@)?([^\s/?#'\"]*)\S*")
_QUERY_TEXT, _USER_TEXT = re.compile(r"\?\S*=\S*"), re.compile(r"[^\s/:@]+:[^\s/@]+@")
_WAIT_SECONDS = (0.3, 1.0, 3.0)  # in addition to the retries of the drivers
# Transferring this much takes about as long as waiting for the first byte, and 64 open tars stay below 256 MiB.
_BLOCK, _KEPT_BLOCKS = 2 << 20, 2
_STREAM_BUFFER = 1 << 20


class DeniedError(StorageError):
    """The server denies access; some do so for missing files if the user may not list the folder."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file, folder or pattern at a URL, with those members of `Path` that readers use.

    Args:
        url: any URL of fsspec, including chains such as `zip://a.jsonl::s3://bucket/docs.zip`.
        size: from a listing [bytes]; None: the server is asked when the size is needed.
    """

    url: str
    size: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        """Return the URL without possible secrets: the query of a signed URL, a password."""
        return "::".join(scheme + mark + path for scheme, mark, path in map(_shown, self.url.split("::")))

    @property
    def scheme(self) -> str:
        """The scheme, before the first colon."""
        return re.split("://|::", self.url, maxsplit=1)[0].lower()

    @property
    def path(self) -> PurePosixPath:
        """Path in the store, from bucket or host; the path of a chain begins with its innermost archive."""
        links = [
            PurePosixPath(scheme.lower() if mark else "", (path if mark else scheme).strip("/"))
            for scheme, mark, path in map(_shown, self.url.split("::"))
        ]
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
        """Whether the URL is a pattern that other files match."""
        path = _shown(self.url.partition("::")[0])[-1]
        return "*" in path or "[" in path

    @property
    def is_web(self) -> bool:
        """Whether it is on a web server, which has no folders and whose URLs may contain queries."""
        return self.scheme in _WEB_SCHEMES

    def is_file(self) -> bool:
        """Tell whether the file exists and may be read.

        Access denied counts as missing: some servers answer so for every file that does not exist.
        """
        try:
            return RemoteStore(self).info()["type"] == "file"
        except (FileNotFoundError, DeniedError):
            return False

    def is_dir(self) -> bool:
        """Tell whether the folder exists; always true on a web server."""
        try:
            return self.is_web or RemoteStore(self).info()["type"] == "directory"
        except FileNotFoundError:
            return False

    def num_bytes(self) -> int:
        """Return the size of the file; see `size_of`."""
        size = RemoteStore(self).info()["size"] if self.size is None else self.size
        if size is None:
            raise StorageError(
                "the server does not say how large the file is", where=str(self), fix="copy it to a disk or a bucket"
            )
        return int(size)

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the file for reading from its beginning."""
        return cast(BinaryIO, io.BufferedReader(RangeReader(self), _STREAM_BUFFER))

    def with_suffix(self, suffix: str) -> "RemoteFile":
        """Return the file beside this one with another suffix."""
        return self._with_name(PurePosixPath(self.name).with_suffix(suffix).name)

    @property
    def parent(self) -> "RemoteFile":
        """The folder that contains the file."""
        return self._with_name("")

    def _with_name(self, name: str) -> "RemoteFile":
        first, chain, rest = self.url.partition("::")
        if self.is_web:
            first = first.partition("?")[0]
        folder, slash, _ = first.rstrip("/").rpartition("/")
        return RemoteFile(f"{folder}{slash}{name}{chain}{rest}")


def _shown(link: str) -> tuple[str, str, str]:
    """Return scheme, "://" and path of one link of a chain, without query, password and (on the web) user."""
    scheme, mark, path = link.partition("://")
    is_web = scheme.lower() in _WEB_SCHEMES
    if is_web:
        path = path.partition("?")[0]
    host, slash, rest = path.partition("/")
    user, _, server = host.rpartition("@")
    # Elsewhere, a name without a password is part of the address: abfs://container@account
    return scheme, mark, (server if is_web or ":" in user else host) + slash + rest


class RemoteStore:
    """The file system behind the URL of a file, folder or pattern; calls are retried if that can fix the error.

    Raises:
        ConfigError: the scheme is unknown, or needs a package that is not installed.
        FileNotFoundError: an archive of the chain does not exist.
    """

    def __init__(self, location: RemoteFile) -> None:
        self._location = location
        self._system, self._path = self._attempt(self._open, ValueError)

    def info(self) -> dict[str, Any]:
        """Return name, size and type ("file" or "directory").

        Raises:
            FileNotFoundError: it does not exist.
        """
        return self._attempt(lambda: self._system.info(self._path))

    def entries(self) -> list[dict[str, Any]]:
        """Return `info` of everything in the folder."""
        return self._attempt(lambda: self._system.ls(self._path, detail=True))

    def glob(self) -> list[dict[str, Any]]:
        """Return `info` of everything that matches the pattern.

        Raises:
            ConfigError: the pattern is invalid.
        """
        return list(self._attempt(lambda: self._system.glob(self._path, detail=True), ValueError).values())

    def url_of(self, name: str) -> str:
        """Return the URL of a name from this file system."""
        _, chain, rest = self._location.url.partition("::")
        return self._system.unstrip_protocol(name) + chain + rest

    def read(self, start: int, end: int, size: int) -> bytes:
        """Return the bytes from `start` up to, but without, `end`, which is at most `size`, that of the whole file.

        Raises:
            StorageError: the file cannot be read, or has become shorter.
        """

        def fetch() -> bytes:
            data = self._system.cat_file(self._path, start=start, end=end)
            if len(data) == size > end - start:  # a web server without support for ranges sends everything
                data = data[start:end]
            if len(data) != end - start:
                raise OSError(f"received {len(data)} bytes instead of {end - start}")
            return data

        try:
            return self._attempt(fetch)
        except FileNotFoundError:
            raise StorageError(
                "file is gone", where=str(self._location), fix="check the bucket, then run again"
            ) from None

    def read_inside(self, name: str, max_bytes: int) -> bytes | int:
        """Return the file `name` inside this folder, or only its size if that is more than `max_bytes`.

        Raises:
            FileNotFoundError: it does not exist, or is a folder.
            DeniedError: the server denies access.
        """
        # On the web, the signature is in the query of the folder, which has to follow the name.
        root, mark, query = self._path.partition("?") if self._location.is_web else (self._path, "", "")
        path = f"{root.rstrip('/')}/{name}{mark}{query}"
        found = self._attempt(lambda: self._system.info(path))
        if found["type"] != "file":
            raise FileNotFoundError(name)
        if (size := found["size"] or 0) > max_bytes:
            return int(size)
        data = self._attempt(lambda: self._system.cat_file(path))
        return data if len(data) <= max_bytes else len(data)

    def _open(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs  # takes a tenth of a second, which local files do not need

        try:
            return url_to_fs(self._location.url)
        except ImportError as error:  # fsspec names the package
            raise ConfigError(
                f"{self._location.scheme}:// needs a package that is not installed",
                where=str(self._location),
                fix=_masked(str(error)),
            ) from None

    def _attempt(self, function: Callable[[], _Result], misuse: type[Exception] | tuple = ()) -> _Result:
        """Call a function, again if that may help; its errors of type `misuse` mean that the URL is wrong."""
        for wait in (*_WAIT_SECONDS, None):
            try:
                return function()
            except UserError:
                raise
            except misuse as error:
                raise ConfigError(
                    f"URL cannot be used: {_masked(str(error))}", where=str(self._location), fix="check it"
                ) from None
            except (IsADirectoryError, NotADirectoryError):
                raise self._missing() from None
            except Exception as error:  # each driver has its own errors
                if isinstance(error, PermissionError) or _status(error) in _STATUS_DENIED:
                    raise DeniedError(
                        f"access denied: {_brief(error)}", where=str(self._location), fix="check your credentials"
                    ) from None
                if isinstance(error, FileNotFoundError) and not self._is_unreachable(error):
                    raise self._missing() from None
                if wait is None:
                    raise StorageError(
                        f"URL cannot be read, tried {len(_WAIT_SECONDS) + 1} times: {_brief(error)}",
                        where=str(self._location),
                        fix="check network and credentials, then run the same command again",
                    ) from None
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _is_unreachable(self, error: FileNotFoundError) -> bool:
        """Tell whether the server was not found: over HTTP, fsspec reports that as a missing file too."""
        return self._location.is_web and error.__cause__ is not None and _status(error) not in _STATUS_MISSING

    def _missing(self) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._location))


def _brief(error: BaseException) -> str:
    error = _cause(error)
    if (status := _status(error)) is not None:
        return f"HTTP {status} {getattr(error, 'message', '')}".rstrip()[:120]
    return f"{type(error).__name__} {_masked(str(error))}"[:120]


def _cause(error: BaseException) -> BaseException:
    """Return the cause of an error: over HTTP, fsspec turns every error into a missing file."""
    return error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error


def _status(error: BaseException) -> int | None:
    """Return the HTTP status, if the error has one."""
    status = getattr(_cause(error), "status", None)
    return status if isinstance(status, int) else None


def _masked(text: str) -> str:
    """Return the message of a driver without possible secrets."""
    return _USER_TEXT.sub("", _QUERY_TEXT.sub("", _URL_TEXT.sub(r"\1\2", text)))


class RangeReader(io.RawIOBase):
    """Reads ranges of a file at a URL, also as a seekable stream; near each other, it reads whole blocks and keeps two.

    A tar is thus read in few requests although the files of a key are not read in order, and a single image of another
    tar costs no more than its own size.
    """

    def __init__(self, file: RemoteFile) -> None:
        from fsspec.caching import BlockCache

        self.size = file.num_bytes()
        self._store, self._block = RemoteStore(file), _BLOCK
        self._cache = BlockCache(self._block, self._read, self.size, maxblocks=_KEPT_BLOCKS)
        self._end = self._position = 0  # of the last range; of the stream

    def _read(self, start: int, end: int) -> bytes:
        return self._store.read(start, min(end, self.size), self.size)

    def pread(self, size: int, offset: int) -> bytes:
        """Return `size` bytes from `offset`, fewer only at the end of the file, as `os.pread` does."""
        end = min(offset + size, self.size)
        if end <= offset:
            return b""
        near, self._end = abs(offset - self._end) <= self._block, end
        if near and (end - 1) // self._block - offset // self._block <= 1:
            return self._cache._fetch(offset, end)
        return self._read(offset, end)

    def readable(self) -> bool:
        """Return True."""
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position and return it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer and return the number of bytes read."""
        data = self.pread(len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
