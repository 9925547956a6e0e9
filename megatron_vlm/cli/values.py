"""Values on the command line: types for argparse that refuse what cannot be meant, before anything starts.

Numbers are within their bounds; paths can exist, and what is written, or only read from a disk, is no URL.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_vlm.config.prepare import MAX_SEED
from megatron_vlm.data.files.locations import Location, RemoteFile, parse_location


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a type for argparse: a whole number from `least` to `most`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least or (most is not None and value > most):
            bounds = f"below {least}" if most is None else f"not from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{value} is {bounds}")
        return value

    return read


def number(least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """Return a type for argparse: a finite number from `least` to `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least:g}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text} is above {most:g}")
        return value

    return read


positive = whole_number(1)
"""A type for argparse: a whole number of at least 1."""

seed = whole_number(0, MAX_SEED)
"""A type for argparse: a seed that every random number generator takes."""


def location(text: str) -> Location:
    """Return a path or a URL; a type for argparse that refuses paths the file system cannot have."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; name a file or a folder")
    place = parse_location(text)
    if isinstance(place, Path):
        try:
            place.exists()
        except OSError as error:
            raise argparse.ArgumentTypeError(f"{text[:100]} cannot be used: {error.strerror}") from None
    return place


def location_text(text: str) -> str:
    """Return a path or a URL as it is; a type for argparse that refuses what `location` refuses."""
    location(text)
    return text


def local_path(text: str) -> Path:
    """Return the path; a type for argparse that refuses a URL, which would become a folder named "s3:"."""
    place = location(text)
    if isinstance(place, RemoteFile):
        raise argparse.ArgumentTypeError(f"{place} is a URL; only a local path works here")
    return place


def new_folder(text: str) -> Path:
    """Return the path of a folder that may not exist yet; a type for argparse that refuses a file."""
    path = _named(local_path(text))
    _check_no_file((path, *path.parents))
    return path


def new_file(text: str) -> Path:
    """Return the path of a file to write; a type for argparse that refuses a folder, and a file in a missing folder."""
    path = local_path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"folder {path.parent} does not exist; create it first")
    return path


def new_name(text: str) -> Path:
    """Return the path whose name new folders begin with; a type for argparse."""
    path = _named(local_path(text))
    _check_no_file(path.parents)
    return path


def _check_no_file(places: Iterable[Path]) -> None:
    blocking = next((place for place in places if place.exists() and not place.is_dir()), None)
    if blocking is not None:
        raise argparse.ArgumentTypeError(f"{blocking} is a file, not a folder")


def _named(path: Path) -> Path:
    """Return a path with a name, unlike "." and "..", so that another can stand beside it."""
    named = path if path.name not in ("", "..") else path.resolve()
    if not named.name:
        raise argparse.ArgumentTypeError(f"{path} cannot be written to; name another folder")
    return named
