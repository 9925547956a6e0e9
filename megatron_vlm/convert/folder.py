"""Read model folders as Hugging Face lays them out."""

import functools
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor

from megatron_vlm.config import CheckpointError
from megatron_vlm.convert.foreign import explain
from megatron_vlm.platform.files.uncached import read_array

CONFIG_NAME = "config.json"
WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
_PICKLED = "pytorch_model.bin"
_SAFETENSORS_SUFFIX = ".safetensors"
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types by their name in safetensors files, in the order in which such a file has its tensors."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a folder stores a tensor."""

    file: Path
    name: str
    """Name in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int | None = None
    """Place of the values in the file [bytes]; None: it is pickled."""

    @property
    def num_bytes(self) -> int:
        """Size of the values [bytes]."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class HFFolder:
    """The weights of a model folder; tensors are read one at a time.

    Args:
        path: folder with model.safetensors or pytorch_model.bin, as one file or several with an index.
        renames: (regular expression, replacement) pairs; the first that matches the start of a name is applied.
        parts: folders with weights, by the prefix that their names get before they are renamed; of two tensors with one
            name, that of the later folder counts. None: only `path`, without a prefix.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(
        self,
        path: str | Path,
        renames: Sequence[tuple[str, str]] = (),
        parts: Mapping[str, Path] | None = None,
    ) -> None:
        self.path = Path(path)
        self.stored: dict[str, Stored] = {}
        self.missing: list[Path] = []
        """Files that an index names and the folder lacks; whether they are needed shows in the tensors."""
        for prefix, folder in (parts or {"": self.path}).items():
            files = _list_files(folder)
            self.missing += files.missing
            for file in files.there:
                for stored in list_tensors(file):
                    self.stored[rename(prefix + stored.name, renames)] = stored

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: as in `stored`, after renaming.
        """
        return read_stored(self.stored[name])


def read_stored(stored: Stored) -> Tensor:
    """Read one tensor."""
    if stored.begin is None:
        return _load_pickle(stored.file)[stored.name]
    try:
        values = read_array(stored.file, stored.begin, stored.begin + stored.num_bytes)
    except EOFError as error:
        raise CheckpointError(
            f"weights cannot be read: {error}", where=str(stored.file), fix="download the file again"
        ) from None
    return torch.empty(0, dtype=stored.dtype).set_(torch.from_numpy(values).untyped_storage()).view(stored.shape)


@dataclass(frozen=True, slots=True)
class _Files:
    """Files with the weights of a folder."""

    there: list[Path]
    missing: list[Path]
    """Those that the index names, too."""


def _list_files(folder: Path) -> _Files:
    """Return the files of the first kind of weights that is complete, otherwise what is there of the first one."""
    partial: _Files | None = None
    for name in (WEIGHTS_NAME, _PICKLED):
        if (folder / name).is_file():
            return _Files([folder / name], [])
        index = folder / f"{name}.index.json"
        if index.is_file():
            found = _indexed(index)
            if not found.missing:
                return found
            partial = partial or found
    if partial is not None:
        if partial.there:
            return partial
        raise missing_files(partial.missing, len(partial.missing))
    raise explain(folder) or CheckpointError(
        f"no {WEIGHTS_NAME} and no {_PICKLED}", where=str(folder), fix="name a folder with the weights"
    )


def missing_files(missing: Sequence[Path], count: int | None = None) -> CheckpointError:
    """Return the error for files that an index names and the folder lacks.

    Args:
        missing: the files.
        count: files that the index names; None: unknown here.
    """
    of = "" if count is None else f" of {count}"
    what = f"{len(missing)}{of} files that the index names are missing, first {missing[0].name}"
    return CheckpointError(what, where=str(missing[0].parent), fix="download the folder again")


def _indexed(index: Path) -> _Files:
    """Return the files that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("index names no files", where=str(index), fix="download the folder again")
    names = sorted(set(map(str, weight_map.values())))
    found = _Files([], [])
    for name in names:
        path = index.parent / name
        (found.there if Path(name).name == name and path.is_file() else found.missing).append(path)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: missing, damaged, or not an object; of a folder that is known to be another kind, which.
    """
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        error = explain(path.parent) or CheckpointError("file is missing", where=str(path), fix="name a model folder")
        raise error from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"file cannot be read: {error}", where=str(path), fix="download it again") from None
    if not isinstance(record, dict):
        raise CheckpointError("file holds no JSON object", where=str(path), fix="download it again")
    return record


@contextmanager
def foreign_values(where: str) -> Iterator[None]:
    """Turn what a setting of another type does to the code that reads it into an error of the file.

    Args:
        where: the file that somebody else wrote.

    Raises:
        CheckpointError: a value has another type than its name promises.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"a setting has a value of a wrong type: {error}", where=where, fix="download the file again"
        ) from error


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON object of settings without those that are null, which stand for a default like those left out.

    Raises:
        CheckpointError: as in `read_json`.
    """
    return _without_nulls(read_json(path))


def _without_nulls(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_nulls(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if value is not None
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON object as transformers does."""
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def rename(name: str, renames: Sequence[tuple[str, str]]) -> str:
    """Apply the first (regular expression, replacement) pair that matches the start of a name."""
    for pattern, replacement in renames:
        if re.match(pattern, name):
            return re.sub(r"\A" + pattern, replacement, name, count=1)
    return name


def list_tensors(file: Path) -> list[Stored]:
    """Return the tensors of a safetensors file or a pickled one.

    Raises:
        CheckpointError: it is damaged, or holds a tensor of a type that torch does not have, or code.
    """
    if file.suffix == _SAFETENSORS_SUFFIX:
        return list_safetensors(file)
    return [Stored(file, name, tuple(value.shape), value.dtype) for name, value in _load_pickle(file).items()]


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; their values stay on the disk until they are used."""
    try:
        if not zipfile.is_zipfile(file):
            return _load_old_pickle(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"weights cannot be read: {str(error).splitlines()[0]}", where=str(file), fix="download the file again"
        ) from None
    return _only_tensors(tensors)


@functools.lru_cache(maxsize=1)
def _load_old_pickle(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of torch before 1.6, which can only be read as a whole."""
    return _only_tensors(torch.load(file, map_location="cpu", weights_only=True))


def _only_tensors(record: Any) -> dict[str, Tensor]:
    return {name: value for name, value in record.items() if isinstance(value, Tensor)}


def list_safetensors(file: Path) -> list[Stored]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: it is damaged, or holds a tensor of a type that torch does not have.
    """
    try:
        with safetensors.safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        places = _places(file)
        return [
            Stored(file, name, tuple(found.get_shape()), DTYPES[found.get_dtype()], places[name])
            for name, found in slices.items()
        ]
    except KeyError as error:
        raise CheckpointError(
            f"a tensor has the unsupported type {error.args[0]}",
            where=str(file),
            fix="use a model that is not quantised",
        ) from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"weights cannot be read: {error}", where=str(file), fix="download the file again"
        ) from None


def _places(file: Path) -> dict[str, int]:
    """Return where the values of each tensor begin in a safetensors file, whose header was checked."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {name: 8 + length + found["data_offsets"][0] for name, found in header.items() if name != "__metadata__"}


def common_type(tensors: Iterable[Stored]) -> torch.dtype:
    """Return the type that can hold the values of all these weights; a folder may mix types.

    Raises:
        CheckpointError: one of them holds no floating-point numbers.
    """
    types = set()
    for stored in tensors:
        types.add(stored.dtype)
        if not stored.dtype.is_floating_point:
            raise CheckpointError(
                f"tensor {stored.name} has the type {str(stored.dtype).removeprefix('torch.')}, which holds no weights",
                where=str(stored.file),
                fix="use a model that is not quantised",
            )
    return reduce(torch.promote_types, types)
