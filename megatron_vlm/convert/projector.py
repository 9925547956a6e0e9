"""The functions that a module of `convert/projectors/` offers; it is found by `model.projection.type`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from megatron_vlm.config import CheckpointError
from megatron_vlm.config.modules import find_module, module_names
from megatron_vlm.config.projectors import ProjectorConfig, make_projector
from megatron_vlm.convert.rules import Rule

PROJECTORS = "megatron_vlm.convert.projectors"
KEY_PREFIX = "model.vision_projection."


@dataclass(frozen=True, slots=True)
class LlavaProjector:
    """A projection as transformers' Llava has it: two linear layers for each feature, an activation between them."""

    activation: str
    """Value of `projector_hidden_act`."""
    rules: list[Rule]
    """Our keys start with `KEY_PREFIX`, their names are those below `multi_modal_projector.`."""


@dataclass(frozen=True, slots=True)
class VilaProjector:
    """A projection as VILA has it."""

    type: str
    """Value of `mm_projector_type`."""
    rules: list[Rule]
    """Our keys start with `KEY_PREFIX`, their names with `layers.`."""


class ProjectorFamily(Protocol):
    """The names of a projection's tensors in other formats, and its initial weights.

    Each function takes the settings of the projection, the width of the features and that of the embeddings.
    """

    FITS_LLAVA: bool
    """Whether transformers' Llava can hold it."""
    VILA_TYPES: Mapping[str, Mapping[str, Any]]
    """Values of VILA's `mm_projector_type` that stand for it, and the settings that each means; none if VILA's code
    does not have it."""

    def llava(self, config: Any, *, input_size: int, output_size: int) -> LlavaProjector | None:
        """Return what transformers' Llava makes of it; None if it cannot hold it."""

    def vila_rules(self, config: Any, *, input_size: int, output_size: int) -> list[Rule] | None:
        """Return the table for VILA's `mm_projector`, with names from `layers.` on; None if VILA cannot hold it."""

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


def llava_projector(config: ProjectorConfig, *, input_size: int, output_size: int) -> LlavaProjector:
    """Return a projection as transformers' Llava has it.

    Raises:
        CheckpointError: it cannot hold this one.
    """
    found = find_projector(config.type).llava(config, input_size=input_size, output_size=output_size)
    if found is None:
        fitting = [name for name in module_names(PROJECTORS) if find_projector(name).FITS_LLAVA]
        raise CheckpointError(
            f"a projection of type {config.type} does not fit the format llava, which has two linear layers for each "
            f"patch: {' or '.join(fitting)}",
            where="model.projection",
            fix="use another projection or format",
        )
    return found


def projector_of(activation: str, *, input_size: int, output_size: int, where: str) -> ProjectorConfig:
    """Return the projection that a LLaVA's `projector_hidden_act` stands for.

    Raises:
        CheckpointError: no projection of this size is written with this activation.
    """
    fitting = [make_projector(name) for name in module_names(PROJECTORS) if find_projector(name).FITS_LLAVA]
    sizes = {"input_size": input_size, "output_size": output_size}
    found = {llava_projector(config, **sizes).activation: config for config in fitting}
    if activation in found:
        return found[activation]
    raise CheckpointError(f"projector_hidden_act={activation}", where=where, fix=f"use {', '.join(found)}")


def vila_projector(config: ProjectorConfig, *, input_size: int, output_size: int) -> VilaProjector:
    """Return a projection as VILA has it.

    Raises:
        CheckpointError: it cannot hold this one.
    """
    projector = find_projector(config.type)
    rules = projector.vila_rules(config, input_size=input_size, output_size=output_size)
    if rules is None:
        fitting = [name for name in module_names(PROJECTORS) if find_projector(name).VILA_TYPES]
        raise CheckpointError(
            f"a projection of type {config.type} does not fit VILA's formats, which have only {', '.join(fitting)}",
            where="model.projection",
            fix="use another projection or format",
        )
    types = (
        theirs for theirs, settings in projector.VILA_TYPES.items() if config == make_projector(config.type, **settings)
    )
    return VilaProjector(next(types), rules)


def projector_of_vila(type: str, where: str) -> ProjectorConfig:
    """Return the projection that a VILA's `mm_projector_type` stands for.

    Raises:
        CheckpointError: it stands for none of ours.
    """
    known = {
        theirs: make_projector(name, **settings)
        for name in module_names(PROJECTORS)
        for theirs, settings in find_projector(name).VILA_TYPES.items()
    }
    if type in known:
        return known[type]
    raise CheckpointError(f"mm_projector_type={type}", where=where, fix=f"use a model with {', '.join(known)}")


def draw_linear(key: str, sizes: Sequence[int], *, std: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Return weight and bias of a linear layer: normal weights, no bias.

    Args:
        key: prefix of the layer, with the final dot.
        sizes: output size, input size; before them the number of layers, if it is a stack.
        std: standard deviation of the weights.
        generator: of the random numbers.
    """
    return {f"{key}weight": torch.randn(*sizes, generator=generator) * std, f"{key}bias": torch.zeros(*sizes[:-1])}


def draw_norm(key: str, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Return weight and bias of a norm that changes nothing yet; arguments as in `draw_linear`."""
    return {f"{key}weight": torch.ones(*sizes), f"{key}bias": torch.zeros(*sizes)}
