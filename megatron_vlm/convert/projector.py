"""What a module of `convert/projectors/` offers, and how it is found: by `model.projection.type`."""

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
    """The names of a projection's tensors in the LLaVA format, and its weights in a new model."""

    ACTIVATION: str
    """LLaVA's `projector_hidden_act`, by which a LLaVA's projection is known."""

    def rules(self, config: Any, *, input_size: int, output_size: int) -> list[Rule]:
        """Return the table: our keys, all with `KEY_PREFIX`; their names below `multi_modal_projector.`.

        Args:
            config: settings of the projection.
            input_size: width of the features.
            output_size: width of the embeddings.
        """

    def draw(
        self, config: Any, *, input_size: int, output_size: int, std: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return weights by our keys, drawn as a new model draws them.

        Args:
            config: settings of the projection.
            input_size: width of the features.
            output_size: width of the embeddings.
            std: standard deviation of the initial weights of the model.
            generator: source of the values.
        """


def find_projector(type: str) -> ProjectorFamily:
    """Return the module of a projection.

    Raises:
        CheckpointError: this type has no conversion; lists those that have one.
    """
    if type not in module_names(PROJECTORS):
        types = ", ".join(module_names(PROJECTORS))
        raise CheckpointError(
            f"a projection of type {type} has no conversion", where="model.projection", fix=f"use {types}"
        )
    return cast(ProjectorFamily, find_module(PROJECTORS, type, "projection"))


def projector_type_of(activation: str, where: str) -> str:
    """Return the type of the projection that LLaVA describes by `projector_hidden_act`.

    Raises:
        CheckpointError: there is none.
    """
    types = {find_projector(name).ACTIVATION: name for name in module_names(PROJECTORS)}
    if activation not in types:
        raise CheckpointError(f"projector_hidden_act={activation}", where=where, fix=f"use {', '.join(types)}")
    return types[activation]


def draw_linear(key: str, sizes: Sequence[int], *, std: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Return weight and bias of a linear layer: normal weights, no bias.

    Args:
        key: of the layer, with a point at its end.
        sizes: of output and input.
        std: standard deviation of the weights.
        generator: source of the values.
    """
    return {f"{key}weight": torch.randn(*sizes, generator=generator) * std, f"{key}bias": torch.zeros(sizes[0])}
