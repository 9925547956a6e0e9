"""The functions that a module of `convert/adapters/` offers; it is found by `model.adapter.type`."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from megatron_vlm.checkpoint.tensors import read_tensor
from megatron_vlm.config import AdapterConfig, CheckpointError, ModelConfig
from megatron_vlm.config.modules import find_module, module_names
from megatron_vlm.convert.family import NO_FORMAT

ADAPTERS = "megatron_vlm.convert.adapters"


class AdapterFamily(Protocol):
    """The tensors of an adapter, and how they go into those of the base."""

    def shapes(self, config: Any, model: ModelConfig) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the tensors that the adapter adds to a checkpoint, by key."""

    def merge(self, config: Any, key: str, weight: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """Return a tensor with which the base alone computes what it computes with the adapter.

        Args:
            config: settings of the adapter.
            key: of the tensor.
            weight: the tensor of the base; that of one layer, if the checkpoint stacks layers.
            read: returns a tensor of the adapter by its key; that of the same layer.
        """


def find_adapter(adapter: AdapterConfig) -> AdapterFamily:
    """Return the module of an adapter.

    Raises:
        CheckpointError: no weights of a base do what this adapter does.
    """
    if adapter.type not in module_names(ADAPTERS):
        raise CheckpointError(
            f"adapter {adapter.type} cannot be merged into the weights of its base",
            where="model.adapter",
            fix=NO_FORMAT,
        )
    return cast(AdapterFamily, find_module(ADAPTERS, adapter.type, "adapter"))


def adapter_shapes(model: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the tensors that the adapter adds to a checkpoint, by key; empty without an adapter.

    Raises:
        CheckpointError: the adapter cannot be merged.
    """
    return find_adapter(model.adapter).shapes(model.adapter, model) if model.adapter is not None else {}


def read_merged(checkpoint: Path, adapter: AdapterConfig | None, key: str, layer: int | None = None) -> Tensor:
    """Read a tensor as `read_tensor` does, with the adapter merged into it, in float32 if that changes it."""
    weight = read_tensor(checkpoint, key, layer)
    if adapter is None:
        return weight
    return find_adapter(adapter).merge(adapter, key, weight, partial(read_tensor, checkpoint, layer=layer))
