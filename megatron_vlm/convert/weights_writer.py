"""Write the weights of a model folder as safetensors files, one tensor at a time, the next one being made meanwhile.

The files are equal to those of `safetensors.torch.save_file`, which takes all tensors of a file at once. The name
`llm/norm.weight` stands for the tensor `norm.weight` in the files of the sub-folder `llm`.
"""

import json
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from megatron_vlm.checkpoint.item_files import ChecksummedStream
from megatron_vlm.config import CheckpointError
from megatron_vlm.convert.folder import DTYPES, INDEX_NAME, WEIGHTS_NAME, Stored, list_safetensors, write_json
from megatron_vlm.platform.ahead import ahead
from megatron_vlm.platform.files.durable import flush_to_disk
from megatron_vlm.platform.files.uncached import UncachedFile, read_blocks

FIX_TABLE = "check that config.yaml is that of the weights; if it is, report the format's table of names"
_ALIGNMENT = 8
_NUM_READERS = 2
"""Tensors read back at a time: a checksum takes longer than reading from a cache or a fast disk."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Announced:
    """A tensor to be written."""

    name: str
    """With the sub-folder of its file, if it is in one."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name_in_file(self) -> str:
        """Name without the sub-folder."""
        return PurePosixPath(self.name).name

    @property
    def sub_folder(self) -> PurePosixPath:
        """Folder of the file within that of the model."""
        return PurePosixPath(self.name).parent

    @property
    def num_bytes(self) -> int:
        """Size of the values [bytes]."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class WeightsWriter:
    """Write safetensors files of limited size and, for each folder with several, an index.

    Args:
        folder: where the files go; sub-folders are made.
        announced: every tensor that will be written.
        max_shard_bytes: largest size of a file [bytes]; a larger tensor gets its own file.
        name: of the file of a folder, if one is enough.
    """

    def __init__(
        self, folder: Path, announced: Sequence[Announced], max_shard_bytes: int, name: str = WEIGHTS_NAME
    ) -> None:
        self._folder, self._announced = folder, {entry.name: entry for entry in announced}
        self._files = _assign_files(announced, max_shard_bytes, name)
        self._file_of = {entry.name: file for file, entries in self._files.items() for entry in entries}
        self._checksums: dict[str, int] = {}

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write all announced tensors, then the indexes.

        Raises:
            CheckpointError: a tensor differs from what was announced, or is missing.
            OSError: a file cannot be written.
        """
        with ExitStack() as stack:
            streams, offsets = {}, {}
            for file, entries in self._files.items():
                (self._folder / file).parent.mkdir(parents=True, exist_ok=True)
                streams[file] = stack.enter_context(UncachedFile(self._folder / file))
                header, starts = _lay_out(entries)
                streams[file].write(header)
                offsets.update(starts)
            for name, tensor in ahead(tensors):
                self._check(name, tensor)
                stream = streams[self._file_of[name]]
                stream.seek(offsets[name])
                written = ChecksummedStream(stream)
                written.write(_bytes_of(tensor))
                written.check()
                self._checksums[name] = written.record.crc32
            for stream in streams.values():
                flush_to_disk(stream)
        missing = [name for name in self._announced if name not in self._checksums]
        if missing:
            raise CheckpointError(f"{len(missing)} tensors were not written, first {missing[0]}", fix=FIX_TABLE)
        for sub_folder in dict.fromkeys(entry.sub_folder for entry in self._announced.values()):
            self._write_index(sub_folder)

    def _write_index(self, sub_folder: PurePosixPath) -> None:
        entries = [entry for entry in self._announced.values() if entry.sub_folder == sub_folder]
        file_of = {entry.name_in_file: PurePosixPath(self._file_of[entry.name]).name for entry in entries}
        if len(set(file_of.values())) > 1:
            total = sum(entry.num_bytes for entry in entries)
            index = {"metadata": {"total_size": total}, "weight_map": file_of}
            write_json(self._folder / sub_folder / INDEX_NAME, index)

    def _check(self, name: str, tensor: Tensor | Stored) -> None:
        expected = self._announced[name]
        if tuple(tensor.shape) != expected.shape or tensor.dtype != expected.dtype:
            raise CheckpointError(
                f"tensor {name} is {list(tensor.shape)} {tensor.dtype}, announced as {list(expected.shape)} "
                f"{expected.dtype}",
                fix=FIX_TABLE,
            )

    def verify(self) -> None:
        """Read everything back and compare names, shapes, types and bytes.

        Raises:
            CheckpointError: the files differ from what was written.
        """
        found = {
            str(PurePosixPath(file).parent / stored.name): stored
            for file in self._files
            for stored in list_safetensors(self._folder / file)
        }
        if set(found) != set(self._announced):
            raise CheckpointError(
                f"{len(found)} tensors in the files, {len(self._announced)} written",
                where=str(self._folder),
                fix="check the disk, then export again",
            )
        with ThreadPoolExecutor(_NUM_READERS) as readers:
            for _ in readers.map(self._read_back, found, found.values()):
                pass  # raises what a thread has raised

    def _read_back(self, name: str, stored: Stored) -> None:
        self._check(name, stored)
        assert stored.begin is not None
        crc = 0
        for block in read_blocks(stored.file, stored.begin, stored.begin + stored.num_bytes):
            crc = zlib.crc32(block, crc)
        if crc != self._checksums[name]:
            raise CheckpointError(
                f"tensor {name} reads back with other values than were written",
                where=str(stored.file),
                fix="check the disk, then export again",
            )


def _assign_files(announced: Sequence[Announced], max_shard_bytes: int, name: str) -> dict[str, list[Announced]]:
    """Return the tensors of each file; a file has its sub-folder before its name."""
    by_folder: dict[PurePosixPath, list[Announced]] = {}
    for entry in announced:
        by_folder.setdefault(entry.sub_folder, []).append(entry)
    return {
        str(sub_folder / file): found
        for sub_folder, entries in by_folder.items()
        for file, found in _files_of_folder(entries, max_shard_bytes, name).items()
    }


def _files_of_folder(entries: Sequence[Announced], max_shard_bytes: int, name: str) -> dict[str, list[Announced]]:
    files: list[list[Announced]] = [[]]
    used = 0
    for entry in entries:
        if used and used + entry.num_bytes > max_shard_bytes:
            files.append([])
            used = 0
        files[-1].append(entry)
        used += entry.num_bytes
    if len(files) == 1:
        return {name: files[0]}
    return {f"model-{number + 1:05d}-of-{len(files):05d}.safetensors": file for number, file in enumerate(files)}


def _lay_out(entries: Sequence[Announced]) -> tuple[bytes, dict[str, int]]:
    """Return the header of a file, and the offset of each tensor in the file [bytes]."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
    for entry in sorted(entries, key=lambda entry: (ranks[entry.dtype], entry.name_in_file)):
        starts[entry.name], end = end, end + entry.num_bytes
        offsets = [starts[entry.name], end]
        header[entry.name_in_file] = {"dtype": _DTYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    begin = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: begin + start for name, start in starts.items()}


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the values as bytes, without a copy if they are contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
