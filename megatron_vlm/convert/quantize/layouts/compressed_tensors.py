"""The `pack-quantized` format of compressed-tensors, symmetric: what transformers and vLLM read under that name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.convert.quantize.groups import Grid, Quantised
from megatron_vlm.convert.quantize.nibbles import pack_nibbles, unpack_nibbles

METHOD = "compressed-tensors"
GRID = Grid(is_symmetric=True)
DTYPE: torch.dtype | None = None
FILE: str | None = None
LOADED_BY = "transformers with the package `compressed-tensors`"
INPUTS, OUTPUTS = 8, 1


def pack(weight: Quantised) -> dict[str, Tensor]:
    """Return weight_packed int32[out, in / 8], weight_scale [out, in / G] and weight_shape int64[2]."""
    return {
        "weight_packed": pack_nibbles(weight.values, torch.int32),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.values.shape, device=weight.values.device),
    }


def unpack(tensors: Mapping[str, Tensor], group_size: int) -> Quantised:
    """Return what was packed."""
    scales = tensors["weight_scale"]
    zeros = torch.full(scales.shape, (GRID.highest + 1) // 2, dtype=torch.uint8)
    return Quantised(unpack_nibbles(tensors["weight_packed"]), scales, zeros)


def settings(group_size: int, others: list[str]) -> dict[str, Any]:
    """Return `quantization_config`."""
    weights = {
        "num_bits": GRID.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": [f"re:.*{name}.*" for name in others],
    }
