"""Adapters, one module each, chosen by `model.adapter.type`: small trainable weights added to a built model.

A module defines the frozen dataclass `Config`; the module of the same name in `models/adapters/` adds the weights.
"""

from typing import TYPE_CHECKING, Annotated, Protocol

from megatron_vlm.config.activations import Activations
from megatron_vlm.config.loading import TypeIn
from megatron_vlm.config.operations import Operations

if TYPE_CHECKING:
    from megatron_vlm.config.model import ModelConfig


class AdapterConfig(Protocol):
    """Settings of an adapter, and what follows: the parts it changes, parameters, operations and activations."""

    @property
    def type(self) -> str:
        """Name of the module."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts that get added weights, as in `PART_NAMES`; these weights learn even if the part is frozen."""

    def parameter_names(self, model: "ModelConfig", part: str) -> tuple[str, ...]:
        """Return the names of the parameters added to one of `parts`, inside it; decoder layers count from 0."""

    def num_parameters(self, model: "ModelConfig", part: str, *, num_layers: int, tensor_parallel_size: int) -> int:
        """Return the number of parameters added on one rank.

        Args:
            model: the model without the adapter.
            part: one of `parts`.
            num_layers: decoder layers on that rank.
            tensor_parallel_size: ranks over which a decoder layer is split.
        """

    def operations(self, model: "ModelConfig", part: str, num_positions: float, num_image_tokens: float) -> Operations:
        """Return the operations added to one of `parts`.

        Args:
            model: the model without the adapter.
            part: one of `parts`.
            num_positions: tokens (decoder) or patches (vision parts).
            num_image_tokens: how many of the tokens are image positions.
        """

    def activations(
        self,
        model: "ModelConfig",
        part: str,
        num_positions: float,
        num_image_tokens: float,
        *,
        num_layers: int,
        tensor_parallel_size: int,
    ) -> Activations:
        """Return the activations added on one rank; positions as for operations, the rest as for parameters."""


Adapter = Annotated[AdapterConfig, TypeIn("megatron_vlm.config.adapters")]
"""Annotation for a settings field that holds an adapter."""
