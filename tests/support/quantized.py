"""The tensors of a quantised folder as those of one that is not."""

from collections.abc import Mapping

from torch import Tensor

from megatron_vlm.convert.quantize.decoder_layer import LINEARS
from megatron_vlm.convert.quantize.layout import Layout


def dequantised(tensors: Mapping[str, Tensor], layout: Layout, group_size: int) -> dict[str, Tensor]:
    """Return all tensors by the names that they have without quantisation; dequantised ones are float32."""
    found: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if ".layers." in module and "vision" not in module and module.split(".")[-1] in LINEARS:
            packed.setdefault(module, {})[suffix] = tensor
        else:
            found[name] = tensor
    for module, parts in packed.items():
        found[f"{module}.weight"] = layout.unpack(parts, group_size).dequantise()
    return found
