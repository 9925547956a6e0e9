"""The functions that a module of `convert/projectors/` offers; it is found by `model.projection.type`."""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from megatron_vlm.config import CheckpointError
from megatron_vlm.config.modules import find_module, module_names
from megatron_vlm.convert.rules import Rule

PROJECTORS = "megatron_vlm.convert.projectors"
KEY_PREFIX = "model.vision_projection."


class ProjectorFamily(Protocol):
    """The names of a projection's tensors in the LLaVA format, and its initial weights."""

    ACTIVATION: str
    """Value of LLaVA's `projector_hidden_act` that stands for this projection."""

    def rules(self, config: Any, *, input_size: int, output_size: int) -> list[Rule]:
        """Return the table: our keys start with `KEY_PREFIX`, their names are those below `multi_modal_projector.`.

        Args:
            config: settings of the projection.
            input_size: width of the features.
            output_size: width of the embeddings.
        """

    def draw(
        self, config: Any, *, input_size: int, output_size: int, std: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return initial weights by key, drawn from the distribution of a new model.

        Args:
            config: settings of the projection.
            input_size: width of the features.
            output_size: width of the embeddings.
            std: standard deviation of the initial weights of the model.
            generator: of the random numbers.
        """


def find_projector(type: str) -> ProjectorFamily:
    """Return the module of a projection.

    Raises:
        CheckpointError: this type cannot be converted; lists those that can.
    """
    if type not in module_names(PROJECTORS):
        types = ", ".join(module_names(PROJECTORS))
        raise CheckpointError(
            f"a projection of type {type} has no conversion", where="model.projection", fix=f"use {types}"
        )
    return cast(ProjectorFamily, find_module(PROJECTORS, type, "projection"))


def projector_type_of(activation: str, where: str) -> str:
    """Return the type of the projection that a LLaVA's `projector_hidden_act` stands for.

    Raises:
        CheckpointError: no projection has this activation.
    """
    types = {find_projector(name).ACTIVATION: name for name in module_names(PROJECTORS)}
    if activation not in types:
        raise CheckpointError(f"projector_hidden_act={activation}", where=where, fix=f"use {', '.join(types)}")
    return types[activation]


def draw_linear(key: str, sizes: Sequence[int], *, std: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Return weight and bias of a linear layer: normal weights, no bias.

    Args:
        key: prefix of the layer, with the final dot.
        sizes: output size, input size.
        std: standard deviation of the weights.
        generator: of the random numbers.
    """
    return {f"{key}weight": torch.randn(*sizes, generator=generator) * std, f"{key}bias": torch.zeros(sizes[0])}
