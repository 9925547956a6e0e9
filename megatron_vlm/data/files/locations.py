"""One type for local files and files in object stores: a path, or any URL that fsspec reads.

Paths are read with plain system calls. Nothing is read over a network unless the user names a URL.
"""

import dataclasses
import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_vlm.config import ConfigError
from megatron_vlm.data.files.remote import RemoteFile, RemoteStore

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")

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
    return location.num_bytes() if isinstance(location, RemoteFile) else location.stat().st_size


def names_files(location: Location) -> bool:
    """Tell whether a location names files, a tar or a pattern, and not a folder; a URL is judged by its text."""
    is_tar = location.suffix.lower() == ".tar" if isinstance(location, RemoteFile) else location.is_file()
    return is_tar or _is_pattern(location)


def _is_pattern(location: Location) -> bool:
    if isinstance(location, RemoteFile):
        return location.is_pattern
    return glob.has_magic(str(location)) and not location.exists()


def folder_of(location: Location) -> Location:
    """Return the location if it is a folder, otherwise the folder that contains it."""
    if isinstance(location, RemoteFile) and (location.is_pattern or location.is_web):
        location = location.parent
        while location.is_pattern:
            location = location.parent
        return location
    while _is_pattern(location):
        location = location.parent
    return location if location.is_dir() else location.parent


def list_location(location: Location, suffixes: tuple[str, ...], option: str = "--input") -> list[Location]:
    """Return the file itself, the files with one of `suffixes` directly inside a folder, or the matches of a pattern.

    A pattern that matches only folders stands for the files in them.

    Raises:
        ConfigError: there is no such file; `option` is where the user named it.
    """
    if _is_pattern(location):
        files, folders = _matches(location)
        files = files or [file for folder in folders for file in list_location(folder, suffixes, option)]
        if not files:
            raise ConfigError(f"no file matches {option}", where=str(location), fix="check the pattern")
        return files
    try:
        if isinstance(location, RemoteFile):
            return _list_remote(location, suffixes)
        if location.is_dir():
            found = sorted(path for path in location.iterdir() if path.name.lower().endswith(suffixes))
            return [path for path in found if path.is_file()]
        if location.exists():
            return [location] if location.is_file() else []
        raise FileNotFoundError
    except FileNotFoundError:
        raise ConfigError(f"{option.strip('-')} does not exist", where=str(location), fix=f"check {option}") from None


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


def _matches(pattern: Location) -> tuple[list[Location], list[Location]]:
    """Return the files and the folders that match a pattern, by name."""
    if isinstance(pattern, RemoteFile):
        store = RemoteStore(pattern)
        return _split(store, store.glob())
    found = [Path(path) for path in sorted(glob.glob(str(pattern), recursive=True))]
    return [path for path in found if path.is_file()], [path for path in found if path.is_dir()]


def _list_remote(location: RemoteFile, suffixes: tuple[str, ...]) -> list[Location]:
    store = RemoteStore(location)
    if not location.url.endswith("/") and (info := store.info())["type"] != "directory":
        return [dataclasses.replace(location, size=info["size"])]
    return _split(store, [entry for entry in store.entries() if entry["name"].lower().endswith(suffixes)])[0]


def _split(store: RemoteStore, entries: list[dict[str, Any]]) -> tuple[list[Location], list[Location]]:
    """Return the files and the folders among entries of a store, by URL."""
    found = sorted(((store.url_of(entry["name"]), entry) for entry in entries), key=lambda one: one[0])
    files = [RemoteFile(url, entry["size"]) for url, entry in found if entry["type"] == "file"]
    return list(files), [RemoteFile(url + "/") for url, entry in found if entry["type"] != "file"]
