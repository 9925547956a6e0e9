"""AutoAWQ's "GEMM": what transformers and vLLM read as `quant_method: awq`.

A column of an integer is a group of 8 outputs, in an order that suits the kernel.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.convert.quantize.groups import Grid, Quantised
from megatron_vlm.convert.quantize.nibbles import pack_nibbles, unpack_nibbles

METHOD = "awq"
GRID = Grid(is_symmetric=False)
DTYPE: torch.dtype | None = torch.float16
FILE: str | None = None
LOADED_BY = "transformers 5 with the package `gptqmodel`, or another program that reads AutoAWQ's GEMM"
INPUTS, OUTPUTS = 8, 8
_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Nibble k of an integer holds this one of its 8 columns."""
_BACK = [_ORDER.index(column) for column in range(8)]


def pack(weight: Quantised) -> dict[str, Tensor]:
    """Return qweight int32[in, out / 8], qzeros int32[in / G, out / 8] and scales [in / G, out]."""
    return {
        "qweight": _pack_columns(weight.values.T),
        "qzeros": _pack_columns(weight.zeros.T),
        "scales": weight.scales.T.contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor], group_size: int) -> Quantised:
    """Return what was packed."""
    values, zeros = (_unpack_columns(tensors[name]).T.contiguous() for name in ("qweight", "qzeros"))
    return Quantised(values, tensors["scales"].T.contiguous(), zeros)


def _pack_columns(levels: Tensor) -> Tensor:
    return pack_nibbles(levels.unflatten(1, (-1, 8))[..., _ORDER].flatten(1), torch.int32)


def _unpack_columns(packed: Tensor) -> Tensor:
    return unpack_nibbles(packed).unflatten(1, (-1, 8))[..., _BACK].flatten(1)


def settings(group_size: int, others: list[str]) -> dict[str, Any]:
    """Return `quantization_config`."""
    return {
        "quant_method": "awq",
        "bits": GRID.bits,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        # transformers 5 compares the beginnings of names as it has them in memory.
        "modules_to_not_convert": [spelling for name in others for spelling in (name, f"model.{name}")],
    }
