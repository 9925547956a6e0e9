"""Check the small files of a checkpoint before torch reads it: pickles run no code, paths stay inside."""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.checkpoint.safe_pickle import UNREADABLE, Record, check_object, unpickle_index
from megatron_vlm.config import CheckpointError

METADATA_NAME = ".metadata"
_BACKEND_NAME = "metadata.json"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_COMMON_NAME = "common.pt"
_NAMES = (METADATA_NAME, _BACKEND_NAME, _COMMON_NAME)
_NO_FILE = (FileNotFoundError, IsADirectoryError)
_OBJECT_KEY = re.compile(r".+/shard_[\d.]+_[\d.]+", re.DOTALL)
"""The place of an object in a grid of objects ends its key; no key of a tensor looks so."""


def check_metadata(checkpoint: Path) -> Record:
    """Reject a checkpoint whose small files are damaged, could run code, or point out of its folder.

    Returns:
        The index, as `unpickle_index` does; the same object as long as the files are the same.

    Raises:
        CheckpointError: names the file.
    """
    # A conversion reads thousands of tensors from one checkpoint, and checks it before each of them.
    return _check_once(checkpoint.absolute(), tuple(map(_stamp, (checkpoint / name for name in _NAMES))))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    if not path.is_file():
        return None
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=8)
def _check_once(checkpoint: Path, _stamps: tuple) -> Record:
    path = checkpoint / METADATA_NAME
    try:
        with path.open("rb") as stream:
            index = unpickle_index(stream)
        objects = list(_objects(index))
        _check_places(index, checkpoint)
    except _NO_FILE:
        raise CheckpointError(
            "checkpoint has no tensor index", where=str(path), fix="use a complete checkpoint"
        ) from None
    except UNREADABLE as error:
        raise _hostile("tensor index", path, error) from None
    for name, begin, length in objects:
        _check_object(checkpoint / name, begin, length)
    _check_backend(checkpoint / _BACKEND_NAME)
    _check_common(checkpoint / _COMMON_NAME)
    return index


def _check_backend(path: Path) -> None:
    try:
        found = json.loads(path.read_bytes())
    except _NO_FILE:
        raise _missing(path) from None
    except (ValueError, RecursionError):
        found = None
    # megatron-core chooses by these names how the files are read.
    if found != _BACKEND:
        raise CheckpointError(
            "metadata.json does not name the format torch_dist, version 1",
            where=str(path),
            fix="use another checkpoint",
        )


def _check_common(path: Path) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _NO_FILE:
        raise _missing(path) from None
    except UNREADABLE as error:
        raise _hostile("common state", path, error) from None
    if not isinstance(state, dict):
        raise _hostile("common state", path, TypeError(f"it is a {type(state).__name__}"))


def _check_places(index: Any, checkpoint: Path) -> None:
    """Check that every stored value lies within a file of the folder."""
    sizes: dict[str, int] = {}
    for name, begin, length in map(_place, _storage(index).values()):
        if name not in sizes:
            if Path(name).name != name or not (checkpoint / name).is_file():
                raise ValueError(f"it names the file {name}, which is not in the folder")
            sizes[name] = (checkpoint / name).stat().st_size
        if not 0 <= begin <= begin + length <= sizes[name]:
            raise ValueError(f"it names bytes {begin} to {begin + length} of {name}, which has {sizes[name]}")


def _objects(index: Any) -> Iterator[tuple[str, int, int]]:
    """Yield the place of each object that torch unpickles without restrictions."""
    kinds = {key: type(value).__name__ for key, value in index.state_dict_metadata.items()}
    keys = {key for key, kind in kinds.items() if kind != "TensorStorageMetadata"}
    for key in keys:
        if kinds[key] != "BytesStorageMetadata" or not _OBJECT_KEY.fullmatch(key):
            raise ValueError(f"it has a {kinds[key]} for {key}")
    for place, info in _storage(index).items():
        if place.fqn in keys:
            yield _place(info)


def _storage(index: Any) -> dict[Any, Any]:
    found = index.storage_data
    if not isinstance(found, dict):
        raise TypeError("it does not say where the values are")
    return found


def _place(info: Any) -> tuple[str, int, int]:
    found = (info.relative_path, info.offset, info.length)
    if [type(value) for value in found] != [str, int, int]:
        raise TypeError("it does not say where a value is")
    return found


def _check_object(path: Path, begin: int, length: int) -> None:
    with path.open("rb") as stream:
        stream.seek(begin)
        content = stream.read(length)
    try:
        check_object(content)
    except UNREADABLE as error:
        raise _hostile("extra state of a module", path, error) from None


def _missing(path: Path) -> CheckpointError:
    return CheckpointError(f"{path.name} is missing", where=str(path), fix="use a complete checkpoint")


def _hostile(what: str, path: Path, error: Exception) -> CheckpointError:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return CheckpointError(
        f"{what} is damaged or hostile: {reason[:120]}", where=str(path), fix="use a checkpoint that you trust"
    )
