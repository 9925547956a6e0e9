"""Paths on the command line: what is written, and what is only read from a disk, is on a file system."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from megatron_vlm.data.files.locations import Location, RemoteFile, parse_location


def location(text: str) -> Location:
    """Return a path or a URL; a type for argparse that refuses a path that no file can have."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; name a file or a folder")
    place = parse_location(text)
    if isinstance(place, Path):
        try:
            place.exists()
        except OSError as error:
            raise argparse.ArgumentTypeError(f"{text[:100]} cannot be used: {error.strerror}") from None
    return place


def local_path(text: str) -> Path:
    """Return the path: a type for argparse that refuses a URL, which would become a folder named "s3:"."""
    place = location(text)
    if isinstance(place, RemoteFile):
        raise argparse.ArgumentTypeError(f"{place} is a URL; only a path of a file system can be used here")
    return place


def new_folder(text: str) -> Path:
    """Return the path of a folder that may not exist yet; a type for argparse that refuses a file."""
    path = _named(local_path(text))
    _check_no_file((path, *path.parents))
    return path


def new_file(text: str) -> Path:
    """Return the path of a file to write; a type for argparse that refuses a folder, and a place in none."""
    path = local_path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"folder {path.parent} does not exist; create it first")
    return path


def new_name(text: str) -> Path:
    """Return the path that new folders are named after, each with an ending of its own; a type for argparse."""
    path = _named(local_path(text))
    _check_no_file(path.parents)
    return path


def _check_no_file(places: Iterable[Path]) -> None:
    blocking = next((place for place in places if place.exists() and not place.is_dir()), None)
    if blocking is not None:
        raise argparse.ArgumentTypeError(f"{blocking} is a file, not a folder")


def _named(path: Path) -> Path:
    """Return a path with a name, which "." and ".." are not, so that another can be put beside it."""
    named = path if path.name not in ("", "..") else path.resolve()
    if not named.name:
        raise argparse.ArgumentTypeError(f"{path} is no folder to write to; name another")
    return named
