"""Read and write model folders in Hugging Face's layout; the only file that knows safetensors."""

import json
import pickle
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_vlm.config import CheckpointError, StorageError

CONFIG_NAME = "config.json"
_SAFETENSORS, _PICKLED = "model.safetensors", "pytorch_model.bin"
_SAFETENSORS_SUFFIX = ".safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor of a folder is."""

    file: Path
    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype


class HFFolder:
    """The weights and settings of a model folder; tensors are read one by one.

    Args:
        path: folder with config.json and model.safetensors or pytorch_model.bin, in one file or with an index.
        renames: (regular expression, replacement): the first that matches the start of a name is applied to it.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, path: str | Path, renames: Sequence[tuple[str, str]] = ()) -> None:
        self.path = Path(path)
        self.config = read_json(self.path / CONFIG_NAME)
        self.stored: dict[str, Stored] = {}
        for file in self._files():
            for stored in _list_tensors(file):
                self.stored[_rename(stored.name, renames)] = stored

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        The file is opened anew each time: pages of a file that stays mapped would stay in memory.

        Args:
            name: as in `stored`, after renaming.
        """
        stored = self.stored[name]
        if stored.file.suffix != _SAFETENSORS_SUFFIX:
            return _load_pickle(stored.file)[stored.name]
        with safetensors.safe_open(stored.file, "pt") as file:
            return file.get_tensor(stored.name)

    def _files(self) -> list[Path]:
        for name in (_SAFETENSORS, _PICKLED):
            if (self.path / name).is_file():
                return [self.path / name]
            index = self.path / f"{name}.index.json"
            if index.is_file():
                names = sorted(set(read_json(index)["weight_map"].values()))
                return [self._inside(name, index) for name in names]
        raise CheckpointError(
            f"no {_SAFETENSORS} and no {_PICKLED}", where=str(self.path), fix="name a folder with the weights"
        )

    def _inside(self, name: str, index: Path) -> Path:
        if Path(name).name != name or not (self.path / name).is_file():
            raise CheckpointError(f"file {name} is missing", where=str(index), fix="download the folder again")
        return self.path / name


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: missing, damaged, or not an object.
    """
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError("file is missing", where=str(path), fix="name a model folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"file cannot be read: {error}", where=str(path), fix="download it again") from None
    if not isinstance(record, dict):
        raise CheckpointError("file holds no JSON object", where=str(path), fix="download it again")
    return record


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON object as transformers does."""
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _rename(name: str, renames: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in renames:
        if re.match(pattern, name):
            return re.sub(r"\A" + pattern, replacement, name, count=1)
    return name


def _list_tensors(file: Path) -> list[Stored]:
    if file.suffix == _SAFETENSORS_SUFFIX:
        return _list_safetensors(file)
    return [Stored(file, name, tuple(value.shape), value.dtype) for name, value in _load_pickle(file).items()]


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, whose values stay on the disk until they are used."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"weights cannot be read: {str(error).splitlines()[0]}", where=str(file), fix="download the file again"
        ) from None
    return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}


def _list_safetensors(file: Path) -> list[Stored]:
    try:
        with safetensors.safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return [
                Stored(file, name, tuple(part.get_shape()), _DTYPES[part.get_dtype()]) for name, part in slices.items()
            ]
    except KeyError as error:
        raise CheckpointError(
            f"a tensor has the type {error.args[0]}", where=str(file), fix="use a model that is not quantised"
        ) from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"weights cannot be read: {error}", where=str(file), fix="get the file again") from None


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that is going to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the values [bytes]."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class WeightsWriter:
    """Write safetensors files of limited size and an index; tensors come in the order of the plan.

    Args:
        folder: where the files go.
        plan: every tensor that will come.
        max_shard_bytes: largest size of a file; a larger tensor gets a file of its own [bytes].
    """

    def __init__(self, folder: Path, plan: Sequence[Planned], max_shard_bytes: int) -> None:
        self._folder, self._plan = folder, {entry.name: entry for entry in plan}
        self._file_of = _assign_files(plan, max_shard_bytes)
        self._waiting: dict[str, Tensor] = {}
        self._checksums: dict[str, int] = {}

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write all tensors of the plan, then the index.

        Raises:
            CheckpointError: a tensor is not as planned, or missing.
        """
        current = None
        for name, tensor in tensors:
            self._check(name, tensor)
            if current not in (None, self._file_of[name]):
                self._flush(current)
            current = self._file_of[name]
            self._waiting[name] = tensor.contiguous()
            self._checksums[name] = _checksum(tensor)
        if current is not None:
            self._flush(current)
        missing = [name for name in self._plan if name not in self._checksums]
        if missing:
            raise CheckpointError(f"{len(missing)} tensors were not written, first {missing[0]}")
        files = sorted(set(self._file_of.values()))
        if len(files) > 1:
            total = sum(entry.num_bytes for entry in self._plan.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._file_of}
            write_json(self._folder / f"{_SAFETENSORS}.index.json", index)

    def _check(self, name: str, tensor: Tensor) -> None:
        planned = self._plan[name]
        if tuple(tensor.shape) != planned.shape or tensor.dtype != planned.dtype:
            raise CheckpointError(
                f"tensor {name} is {list(tensor.shape)} {tensor.dtype}, planned {list(planned.shape)} {planned.dtype}"
            )

    def _flush(self, file: str | None) -> None:
        try:
            save_file(self._waiting, self._folder / str(file), metadata={"format": "pt"})
        except SafetensorError as error:
            raise StorageError(
                f"weights not written: {error}", where=str(self._folder / str(file)), fix="make room or change folder"
            ) from None
        # safetensors writes files that only their owner can read.
        (self._folder / str(file)).chmod(self._folder.stat().st_mode & 0o666)
        self._waiting = {}

    def verify(self) -> None:
        """Read everything back and compare names, shapes, types and bytes.

        Raises:
            CheckpointError: the files do not hold what was written.
        """
        found: dict[str, Stored] = {}
        for file in sorted(set(self._file_of.values())):
            for stored in _list_safetensors(self._folder / file):
                found[stored.name] = stored
        if set(found) != set(self._plan):
            raise CheckpointError(
                f"{len(found)} tensors in the files, {len(self._plan)} written",
                where=str(self._folder),
                fix="check the disk and export again",
            )
        for name, stored in found.items():
            with safetensors.safe_open(stored.file, "pt") as opened:
                tensor = opened.get_tensor(name)
            self._check(name, tensor)
            if _checksum(tensor) != self._checksums[name]:
                raise CheckpointError(
                    f"tensor {name} has other values than were written",
                    where=str(stored.file),
                    fix="check the disk and export again",
                )


def _assign_files(plan: Sequence[Planned], max_shard_bytes: int) -> dict[str, str]:
    numbers: dict[str, int] = {}
    number = used = 0
    for entry in plan:
        if used and used + entry.num_bytes > max_shard_bytes:
            number, used = number + 1, 0
        numbers[entry.name] = number
        used += entry.num_bytes
    if number == 0:
        return dict.fromkeys(numbers, _SAFETENSORS)
    return {name: f"model-{part + 1:05d}-of-{number + 1:05d}.safetensors" for name, part in numbers.items()}


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
