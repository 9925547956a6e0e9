"""The functions that a module of `convert/quantize/layouts/` offers; it is found by its name."""

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from megatron_vlm.config import UsageError
from megatron_vlm.config.modules import find_module, module_names
from megatron_vlm.convert.quantize.groups import Grid, Quantised

LAYOUTS = "megatron_vlm.convert.quantize.layouts"


class Layout(Protocol):
    """How quantised weights lie in a folder."""

    METHOD: str
    """The value of `--quantize` that it belongs to."""
    GRID: Grid
    """The levels that it can store."""
    DTYPE: torch.dtype | None
    """Of scales, and of all tensors that are not quantised; None: any."""
    FILE: str | None
    """Name of the pickle that holds the whole language model, in its sub-folder; None: its safetensors files do."""
    LOADED_BY: str
    """The programs that load it, for people."""
    INPUTS: int
    OUTPUTS: int
    """Numbers of inputs and outputs of a matrix are multiples of these."""

    def pack(self, weight: Quantised) -> dict[str, Tensor]:
        """Return the tensors of a matrix by what follows the name of its module; works on device "meta", too."""

    def unpack(self, tensors: Mapping[str, Tensor], group_size: int) -> Quantised:
        """Return the matrix that `pack` was given."""

    def settings(self, group_size: int, others: list[str]) -> dict[str, Any]:
        """Return `quantization_config` of config.json; empty for a layout that has none.

        Args:
            group_size: inputs that share a scale.
            others: parts of the names of modules whose weights are not quantised.
        """


def find_layout(method: str, name: str | None) -> Layout:
    """Return a layout.

    Args:
        method: as `--quantize` has it.
        name: None: the method's first by name.

    Raises:
        UsageError: there is no such method, or it has no such layout; lists what there is.
    """
    layouts = {module: cast(Layout, find_module(LAYOUTS, module, "layout")) for module in module_names(LAYOUTS)}
    of_method = {module: layout for module, layout in layouts.items() if layout.METHOD == method}
    if not of_method:
        methods = sorted({layout.METHOD for layout in layouts.values()})
        raise UsageError(f"unknown method of quantisation {method!r}", fix=f"choose one of {', '.join(methods)}")
    if name is not None and name not in of_method:
        raise UsageError(f"{method} has no layout {name!r}", fix=f"choose one of {', '.join(of_method)}")
    return of_method[name or min(of_method)]
