"""The tensors of a checkpoint as its index lists them, read piece by piece without a model and without a process group.

megatron-core's reader serves the ranks of a job: each time, it reads the index, compares it with what the other ranks
want, and copies every value into its place. Here the index is read once, and a value that one piece of a file holds is
returned as it was read.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_vlm.checkpoint.pickles import METADATA_NAME, check_metadata
from megatron_vlm.checkpoint.safe_pickle import UNREADABLE
from megatron_vlm.config import CheckpointError
from megatron_vlm.platform.files.uncached import read_array
from megatron_vlm.platform.reused_tensors import empty

_VALUES = "data/0"
"""Record of the values in what torch.save writes of one tensor."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor, stored in one place of a file."""

    offsets: tuple[int, ...]
    """Index of its first element."""
    sizes: tuple[int, ...]
    file: Path
    begin: int
    """Where it begins in the file [bytes]."""
    length: int
    """What it takes in the file [bytes]."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


def list_stored(folder: Path) -> Mapping[str, StoredTensor]:
    """Return the tensors of a checkpoint by key; those of its base are not among them.

    Raises:
        CheckpointError: a small file of the checkpoint is damaged or hostile.
    """
    return _list(check_metadata(folder), folder)


@lru_cache(maxsize=8)
def _list(index: Any, folder: Path) -> Mapping[str, StoredTensor]:
    try:
        places: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        for place, info in index.storage_data.items():
            places[place.fqn].append((place, info))
        return {
            key: StoredTensor(tuple(entry.size), entry.properties.dtype, tuple(_pieces(entry, places[key], folder)))
            for key, entry in index.state_dict_metadata.items()
            if hasattr(entry, "chunks")
        }
    except UNREADABLE as error:
        raise CheckpointError(
            f"tensor index is damaged: {error}", where=str(folder / METADATA_NAME), fix="use another checkpoint"
        ) from None


def _pieces(entry: Any, places: Sequence[tuple[Any, Any]], folder: Path) -> Iterator[Piece]:
    sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}
    for place, info in places:
        offsets = tuple(place.offset)
        yield Piece(offsets, sizes[offsets], folder / info.relative_path, info.offset, info.length)


def read_stored(stored: StoredTensor, layer: int | None = None) -> Tensor:
    """Read the values of a tensor.

    Args:
        stored: the tensor.
        layer: read only this index of the first axis, which the result lacks; None: read all.

    Raises:
        CheckpointError: a file holds something other than the index says, or the pieces do not cover the tensor.
        OSError: a file cannot be read.
    """
    sizes = stored.shape if layer is None else (1, *stored.shape[1:])
    offsets = tuple(layer or 0 if axis == 0 else 0 for axis in range(len(sizes)))
    wanted = [piece for piece in stored.pieces if prod(_overlap(piece, offsets, sizes)[1])]
    if [(piece.offsets, piece.sizes) for piece in wanted] == [(offsets, sizes)]:
        whole = _read(wanted[0], stored.dtype)
    else:
        whole = empty(sizes, stored.dtype)
        missing = prod(sizes)
        for piece in wanted:
            first, lengths = _overlap(piece, offsets, sizes)
            source, target = _read(piece, stored.dtype), whole
            for axis, (start, length) in enumerate(zip(first, lengths, strict=True)):
                source = source.narrow(axis, start - piece.offsets[axis], length)
                target = target.narrow(axis, start - offsets[axis], length)
            target.copy_(source)
            missing -= prod(lengths)
        if missing:
            where = str(wanted[0].file.parent) if wanted else ""
            raise CheckpointError("a tensor is stored in part only", where=where, fix="use another checkpoint")
    return whole if layer is None else whole[0]


def _overlap(piece: Piece, offsets: Sequence[int], sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return where a piece and a box overlap: index of the first element, and sizes, 0 if they do not."""
    first = [max(pair) for pair in zip(piece.offsets, offsets, strict=True)]
    ends = [
        min(begin + size, other + length)
        for begin, size, other, length in zip(piece.offsets, piece.sizes, offsets, sizes, strict=True)
    ]
    return first, [max(0, end - begin) for begin, end in zip(first, ends, strict=True)]


def _read(piece: Piece, dtype: torch.dtype) -> Tensor:
    """Return the values of a piece."""
    try:
        with piece.file.open("rb") as stream:
            view: Any = _create_file_view(stream, piece.begin, piece.length)
            with torch.serialization.skip_data():
                found = torch.load(view, map_location="cpu", weights_only=True)
            view.seek(0)
            archive: Any = torch._C.PyTorchFileReader(view)
            begin = piece.begin + archive.get_record_offset(_VALUES)
        end = begin + found.untyped_storage().nbytes()
        if end > piece.begin + piece.length:
            raise ValueError("it ends before its values")
        values = torch.from_numpy(read_array(piece.file, begin, end)).untyped_storage()
        found = found.detach().set_(values, found.storage_offset(), found.size(), found.stride())
        if found.dtype != dtype or found.numel() != prod(piece.sizes):
            raise ValueError(f"{list(found.shape)} {found.dtype} for {list(piece.sizes)} {dtype}")
        return found.view(piece.sizes)
    except UNREADABLE as error:
        reason = next(iter(str(error).splitlines()), "")[:120]
        raise CheckpointError(
            f"values cannot be read: {type(error).__name__}: {reason}",
            where=str(piece.file),
            fix="use another checkpoint, or copy this one again",
        ) from None
