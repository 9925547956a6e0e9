"""Files of this machine and of object stores by one type: a path, or any URL that fsspec reads.

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
    """Return a path, or what a URL names; nothing is looked at."""
    return RemoteFile(text) if _URL.match(text) else Path(text)


def place_of(location: Location) -> PurePosixPath:
    """Return an absolute path that names the file among all others; two of one folder differ in their last part."""
    return location.path if isinstance(location, RemoteFile) else PurePosixPath(location.resolve())


def name_files(locations: Sequence[Location]) -> dict[str, Location]:
    """Return files by name, relative to the folder that all are in; one that is given twice comes once.

    Raises:
        ConfigError: two URLs differ in nothing but what may be a secret, and would have one name.
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
                "two URLs differ in their query or user alone, by which no file is named",
                where=str(location),
                fix="give each file once, under a name of its own",
            )
    return named


def size_of(location: Location) -> int:
    """Return the size of a file [bytes].

    Raises:
        StorageError: it cannot be found out.
    """
    if not isinstance(location, RemoteFile):
        return location.stat().st_size
    return remote_size(location)


def is_file(location: Location) -> bool:
    """Tell whether there is a file that may be read.

    Where a server refuses, there is none for us: some say so of each file that does not exist.
    """
    if not isinstance(location, RemoteFile):
        return location.is_file()
    try:
        return RemoteStore(location).info()["type"] == "file"
    except (FileNotFoundError, DeniedError):
        return False


def is_folder(location: Location) -> bool:
    """Tell whether there is a folder; of a web server, which has none, always true."""
    if not isinstance(location, RemoteFile):
        return location.is_dir()
    if location.scheme in WEB_SCHEMES:
        return True
    try:
        return RemoteStore(location).info()["type"] == "directory"
    except FileNotFoundError:
        return False


def names_files(location: Location) -> bool:
    """Tell whether a place that is a folder or tars is tars: a file or a pattern, of which a URL tells by its text."""
    if isinstance(location, RemoteFile):
        return location.is_pattern or location.suffix.lower() == ".tar"
    return location.is_file() or (not location.exists() and glob.has_magic(str(location)))


def can_list(folder: Location) -> bool:
    """Tell whether the files of a folder are known; a web server need not tell them."""
    return not isinstance(folder, RemoteFile) or folder.scheme not in WEB_SCHEMES


def folder_of(location: Location) -> Location:
    """Return the location itself if it is a folder, else the folder that it is in."""
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
    """Return the file itself, the files directly inside of a folder with one of `suffixes`, or what a pattern matches.

    A pattern that matches no file stands for the folders that it matches.

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
    matching = [Path(path) for path in sorted(glob.glob(str(location), recursive=True))]
    if not matching:
        raise _unmatched(location, option)
    files: list[Location] = [path for path in matching if path.is_file()]
    files = files or [file for folder in matching for file in list_location(folder, suffixes, option)]
    if not files:
        raise _unmatched(location, option)
    return files


def check_suffixes(files: Iterable[Location], suffixes: tuple[str, ...], option: str = "--input") -> None:
    """Refuse files that the user named and that are of another kind by their names; without a dot, these tell nothing.

    Raises:
        ConfigError: a file has none of `suffixes`; `option` is where the user gave it.
    """
    for file in files:
        if "." in file.name and not file.name.lower().endswith(suffixes):
            raise ConfigError(
                f"file of {option} is none of {', '.join(suffixes)}",
                where=str(file),
                fix="unpack, rename or leave it out",
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
