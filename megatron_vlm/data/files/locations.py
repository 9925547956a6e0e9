"""One type for local files and files in object stores: a path, or any URL that fsspec reads.

Paths are read with plain system calls. Nothing is read over a network unless the user names a URL.
"""

import dataclasses
import glob
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from megatron_vlm.config import ConfigError
from megatron_vlm.data.files.remote import (
    WEB_SCHEMES,
    DeniedError,
    RemoteFile,
    RemoteStore,
    RemoteStream,
    remote_size,
)

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_STREAM_BUFFER = 1 << 20

Location = Path | RemoteFile
"""Where a file is."""


def parse_location(text: str) -> Location:
    """Return the path or URL that a text names, without accessing it."""
    return RemoteFile(text) if _URL.match(text) else Path(text)


def place_of(location: Location) -> PurePosixPath:
    """Return an absolute path that identifies the file; paths of files in one folder differ in their names."""
    return location.path if isinstance(location, RemoteFile) else PurePosixPath(location.resolve())


def name_files(locations: Sequence[Location]) -> dict[str, Location]:
    """Return files by name, relative to their common folder; a file that is given twice is listed once.

    Raises:
        ConfigError: two URLs differ only in what may be a secret, so they would have the same name.
    """
    if not locations:
        return {}
    places = [place_of(location) for location in locations]
    root = os.path.commonpath([place.parent for place in places])
    named: dict[str, Location] = {}
    for place, location in zip(places, locations, strict=True):
        name = os.path.relpath(place, root)
        other = named.setdefault(name, location)
        if isinstance(location, RemoteFile) and isinstance(other, RemoteFile) and other.url != location.url:
            raise ConfigError(
                "two URLs differ only in their query or user, which are not part of a file's name",
                where=str(location),
                fix="give each file once, under its own name",
            )
    return named


def size_of(location: Location) -> int:
    """Return the size of a file [bytes].

    Raises:
        StorageError: the server does not tell.
    """
    if not isinstance(location, RemoteFile):
        return location.stat().st_size
    return remote_size(location)


def is_file(location: Location) -> bool:
    """Tell whether the file exists and may be read.

    Access denied counts as missing: some servers answer so for every file that does not exist.
    """
    if not isinstance(location, RemoteFile):
        return location.is_file()
    try:
        return RemoteStore(location).info()["type"] == "file"
    except (FileNotFoundError, DeniedError):
        return False


def is_folder(location: Location) -> bool:
    """Tell whether the folder exists; always true on a web server, which has no folders."""
    if not isinstance(location, RemoteFile):
        return location.is_dir()
    if location.scheme in WEB_SCHEMES:
        return True
    try:
        return RemoteStore(location).info()["type"] == "directory"
    except FileNotFoundError:
        return False


def names_files(location: Location) -> bool:
    """Tell whether a location names files, a tar or a pattern, and not a folder; a URL is judged by its text."""
    if isinstance(location, RemoteFile):
        return location.is_pattern or location.suffix.lower() == ".tar"
    return location.is_file() or (not location.exists() and glob.has_magic(str(location)))


def can_list(folder: Location) -> bool:
    """Tell whether the files of a folder can be listed, which web servers do not offer."""
    return not isinstance(folder, RemoteFile) or folder.scheme not in WEB_SCHEMES


def folder_of(location: Location) -> Location:
    """Return the location if it is a folder, otherwise the folder that contains it."""
    if isinstance(location, RemoteFile) and (location.is_pattern or location.scheme in WEB_SCHEMES):
        location = location.parent
        while location.is_pattern:
            location = location.parent
        return location
    if isinstance(location, Path):
        while glob.has_magic(str(location)) and not location.exists():
            location = location.parent
    return location if is_folder(location) else location.parent


def list_location(location: Location, suffixes: tuple[str, ...], option: str = "--input") -> list[Location]:
    """Return the file itself, the files with one of `suffixes` directly inside a folder, or the matches of a pattern.

    A pattern that matches only folders stands for the files in them.

    Raises:
        ConfigError: there is no such file; `option` is where the user named it.
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
    matching = [Path(path) for path in sorted(glob.glob(str(location), recursive=True))]
    if not matching:
        raise _unmatched(location, option)
    files: list[Location] = [path for path in matching if path.is_file()]
    files = files or [file for folder in matching for file in list_location(folder, suffixes, option)]
    if not files:
        raise _unmatched(location, option)
    return files


def check_suffixes(files: Iterable[Location], suffixes: tuple[str, ...], option: str = "--input") -> None:
    """Refuse files of another kind that the user named; a name without a dot is accepted.

    Raises:
        ConfigError: a file has none of `suffixes`; `option` is where the user named it.
    """
    for file in files:
        if "." in file.name and not file.name.lower().endswith(suffixes):
            raise ConfigError(
                f"file of {option} is not one of {', '.join(suffixes)}",
                where=str(file),
                fix="unpack it, rename it or leave it out",
            )


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
    if location.is_pattern and not files:
        folders = sorted(store.url_of(entry["name"]) + "/" for entry in entries)
        files = [file for folder in folders for file in _list_remote(RemoteFile(folder), suffixes, option)]
        if not files:
            raise _unmatched(location, option)
        return files
    return sorted(files, key=lambda file: file.url)


def open_stream(location: Location) -> BinaryIO:
    """Open a file for reading from its beginning.

    Raises:
        OSError: the local file cannot be opened.
        StorageError: the URL cannot be read.
    """
    if not isinstance(location, RemoteFile):
        return location.open("rb")
    return cast(BinaryIO, io.BufferedReader(RemoteStream(location), _STREAM_BUFFER))
