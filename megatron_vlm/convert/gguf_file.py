"""GGUF files, written tensor by tensor and read back; the only module that knows the package `gguf`."""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.config import CheckpointError, UsageError
from megatron_vlm.convert.weights_writer import Announced
from megatron_vlm.platform.files.durable import flush_to_disk

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
"""Values of llama.cpp's `llama_ftype` for the type of most tensors."""
_QUANTIZATION_VERSION = 2


def require_gguf() -> None:
    """Check that the package is installed.

    Raises:
        UsageError: it is not.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UsageError("the format gguf needs the package gguf", fix="pip install 'megatron_vlm[gguf]'") from None


def tensor_names(architecture: str, num_layers: int) -> Callable[[str], str]:
    """Return a function from the names of transformers to those of llama.cpp.

    Args:
        architecture: as in `gguf.MODEL_ARCH`, e.g. "LLAMA".
        num_layers: layers of the model.
    """
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], num_layers)

    def translate(name: str) -> str:
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, f"llama.cpp has no name for {name}"
        return found

    return translate


def write_gguf(
    path: Path,
    settings: Mapping[str, Any],
    announced: Sequence[Announced],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
) -> None:
    """Write a file, then read it back.

    Args:
        path: the file.
        settings: its keys; numbers are written as uint32 and float32. `general.architecture` is one of them.
        announced: every tensor, in the order of `tensors`.
        tensors: the same, with their values; each is made when it is asked for.
        dtype: of most tensors.

    Raises:
        CheckpointError: the file reads back with other values than were written.
        OSError: the file cannot be written.
    """
    import gguf

    writer = gguf.GGUFWriter(path, settings["general.architecture"])
    rest = {key: value for key, value in settings.items() if key != "general.architecture"}
    versions = {"general.file_type": _FILE_TYPES[dtype], "general.quantization_version": _QUANTIZATION_VERSION}
    for key, value in {**rest, **versions}.items():
        _setter(writer, value)(key, value)
    for entry in announced:
        like = _values_of(torch.empty(0, dtype=entry.dtype))
        kind = gguf.GGMLQuantizationType[_TYPES[entry.dtype]]
        writer.add_tensor_info(entry.name, entry.shape, like.dtype, entry.num_bytes, kind)
    checksums = {}
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry, (name, tensor) in zip(announced, tensors, strict=True):
        assert (name, tuple(tensor.shape), tensor.dtype) == (entry.name, entry.shape, entry.dtype)
        values = _values_of(tensor)
        writer.write_tensor_data(values)
        checksums[name] = zlib.crc32(values)
    writer.close()
    with path.open("rb+") as stream:
        flush_to_disk(stream)
    _check(path, checksums)


def _setter(writer: Any, value: Any) -> Callable[[str, Any], None]:
    kinds: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    return kinds[type(value)]


def _values_of(tensor: Tensor) -> Any:
    """Return the values as an array; numpy has no bfloat16, so those are bits."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _check(path: Path, checksums: Mapping[str, int]) -> None:
    import gguf

    found = {tensor.name: zlib.crc32(tensor.data.tobytes()) for tensor in gguf.GGUFReader(path).tensors}
    if found != checksums:
        wrong = sorted(name for name in {*found, *checksums} if found.get(name) != checksums.get(name))
        raise CheckpointError(
            f"tensor {wrong[0]} reads back with other values than were written",
            where=str(path),
            fix="check the disk, then export again",
        )
