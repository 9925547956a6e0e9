"""TinyChat's second layout (`*-v2.pt`): one pickle with the state of the language model.

Four rows are interleaved, 64 inputs at a time; each 32 inputs stand in the order in which the kernel unpacks them.
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
FILE: str | None = "llm-w{bits}-g{group_size}-awq-v2.pt"
LOADED_BY = "TinyChat of llm-awq"
INPUTS, OUTPUTS = 64, 4
_ROWS, _RUN = 4, 64
_ORDER = [8 * (position % 4) + position // 4 for position in range(32)]
_BACK = [_ORDER.index(column) for column in range(32)]


def pack(weight: Quantised) -> dict[str, Tensor]:
    """Return qweight int16[out / 4, in], scales and scaled_zeros [g, out], where g >= in / G rows end with zeros.

    A weight is `value * scale + scaled_zero`.
    """
    ordered = weight.values.unflatten(1, (-1, 32))[..., _ORDER].flatten(1)
    rows = ordered.unflatten(0, (-1, _ROWS)).unflatten(2, (-1, _RUN)).transpose(1, 2).flatten(1)
    scaled_zeros = -weight.scales * weight.zeros.to(weight.scales.dtype)
    return {
        "qweight": pack_nibbles(rows, torch.int16),
        "scales": _padded(weight.scales.T, weight.group_size),
        "scaled_zeros": _padded(scaled_zeros.T, weight.group_size),
    }


def unpack(tensors: Mapping[str, Tensor], group_size: int) -> Quantised:
    """Return what was packed."""
    rows = unpack_nibbles(tensors["qweight"]).unflatten(1, (-1, _ROWS, _RUN)).transpose(1, 2)
    values = rows.flatten(2).flatten(0, 1).unflatten(1, (-1, 32))[..., _BACK].flatten(1)
    groups = values.shape[1] // group_size
    scales, scaled_zeros = (tensors[name][:groups].T.contiguous() for name in ("scales", "scaled_zeros"))
    return Quantised(values, scales, (-scaled_zeros.float() / scales.float()).round().to(torch.uint8))


def _padded(rows: Tensor, group_size: int) -> Tensor:
    """Append rows of zeros up to a multiple of 8, of 16 for groups of 64, of 32 for groups of 32."""
    multiple = 8 * max(1, 128 // group_size)
    return torch.cat([rows, rows.new_zeros((-len(rows) % multiple, rows.shape[1]))])


def settings(group_size: int, others: list[str]) -> dict[str, Any]:
    """Return nothing: TinyChat is told on its command line."""
    return {}
