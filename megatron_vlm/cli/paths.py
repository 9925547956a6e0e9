"""Paths on the command line: what is written, and what is only read from a disk, is on a file system."""

import argparse
from pathlib import Path

from megatron_vlm.data.sources.locations import RemoteFile, parse_location


def local_path(text: str) -> Path:
    """Return the path: a type for argparse that refuses a URL, which would become a folder named "s3:"."""
    location = parse_location(text)
    if isinstance(location, RemoteFile):
        raise argparse.ArgumentTypeError(f"{location} is a URL; only a path of a file system can be used here")
    return location


def new_folder(text: str) -> Path:
    """Return the path of a folder that may not exist yet; a type for argparse that refuses a file."""
    path = local_path(text)
    try:
        blocking = next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None)
    except OSError as error:
        raise _unusable(path, error) from None
    if blocking is not None:
        raise argparse.ArgumentTypeError(f"{blocking} is a file, not a folder")
    return path


def new_file(text: str) -> Path:
    """Return the path of a file to write; a type for argparse that refuses a folder, and a place in none."""
    path = local_path(text)
    try:
        is_folder, has_folder = path.is_dir(), path.absolute().parent.is_dir()
    except OSError as error:
        raise _unusable(path, error) from None
    if is_folder:
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file")
    if not has_folder:
        raise argparse.ArgumentTypeError(f"folder {path.parent} does not exist; create it first")
    return path


def _unusable(path: Path, error: OSError) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{str(path)[:100]} cannot be used: {error.strerror}")
