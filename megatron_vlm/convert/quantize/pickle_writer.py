"""Write the tensors of one sub-folder as a pickle, as TinyChat loads its language model."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from megatron_vlm.config import CheckpointError
from megatron_vlm.convert.weights_writer import FIX_TABLE, Announced, WeightsWriter
from megatron_vlm.platform.files.durable import flush_to_disk


class PickleWriter:
    """Write a dict of the tensors in a sub-folder with torch.save, and the others as safetensors files.

    Memory holds all tensors of the pickle: of 7B parameters in 4 bits, 4 GB.

    Args:
        folder: of the model.
        file: the pickle; the names in it are without its sub-folder.
        announced: every tensor that will be written.
        max_shard_bytes: as for `WeightsWriter`.
    """

    def __init__(self, folder: Path, file: PurePosixPath, announced: Sequence[Announced], max_shard_bytes: int) -> None:
        self._path, self._prefix = folder / file, f"{file.parent}/"
        self._announced = [entry.name for entry in announced if entry.name.startswith(self._prefix)]
        others = [entry for entry in announced if not entry.name.startswith(self._prefix)]
        self._writer = WeightsWriter(folder, others, max_shard_bytes)
        self._pickled: dict[str, Tensor] = {}
        self._checksums: dict[str, int] = {}

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write all announced tensors; see `WeightsWriter.write`."""
        self._writer.write(self._others(tensors))
        missing = [name for name in self._announced if name.removeprefix(self._prefix) not in self._pickled]
        if missing:
            raise CheckpointError(f"{len(missing)} tensors were not written, first {missing[0]}", fix=FIX_TABLE)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("wb") as stream:
            torch.save(self._pickled, stream)
            flush_to_disk(stream)
        self._checksums = {name: _checksum(tensor) for name, tensor in self._pickled.items()}
        self._pickled = {}

    def _others(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if name.startswith(self._prefix):
                # A view would be saved with all that it is a view of.
                self._pickled[name.removeprefix(self._prefix)] = tensor.clone(memory_format=torch.contiguous_format)
            else:
                yield name, tensor

    def verify(self) -> None:
        """Read everything back and compare names and bytes.

        Raises:
            CheckpointError: the files differ from what was written.
        """
        self._writer.verify()
        found = torch.load(self._path, map_location="cpu", weights_only=True, mmap=True)
        if {name: _checksum(tensor) for name, tensor in found.items()} != self._checksums:
            raise CheckpointError(
                "tensors read back with other values than were written",
                where=str(self._path),
                fix="check the disk, then export again",
            )


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data)
