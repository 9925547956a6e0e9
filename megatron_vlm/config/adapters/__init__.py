"""Adapters: small weights added to a built model whose own weights rest, named in `model.adapter.type`.

Each module is one and offers the dataclass `Config`; the module of the same name in `models/adapters/` adds it. There
is none yet.
"""

from typing import TYPE_CHECKING, Annotated, Protocol

from megatron_vlm.config.loading import PartOf
from megatron_vlm.config.operations import Operations

if TYPE_CHECKING:
    from megatron_vlm.config.model import ModelConfig


class AdapterConfig(Protocol):
    """What every adapter says about itself: the parts that it changes, its parameters and its operations."""

    @property
    def type(self) -> str:
        """Name of the module."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts it adds weights to, as in `PART_NAMES`; the added weights learn even where the part is frozen."""

    def num_parameters(self, model: "ModelConfig", part: str, *, num_layers: int, tensor_parallel_size: int) -> int:
        """Return the parameters that it adds to one rank.

        Args:
            model: the model without the adapter.
            part: one of `parts`.
            num_layers: layers of the part on that rank.
            tensor_parallel_size: ranks that share a decoder layer; 1 for the vision parts, which are whole everywhere.
        """

    def operations(self, model: "ModelConfig", part: str, num_positions: int) -> Operations:
        """Return the operations that it adds to one of `parts` on so many tokens (decoder) or patches (vision)."""


Adapter = Annotated[AdapterConfig, PartOf("megatron_vlm.config.adapters")]
"""Type of a settings field that holds an adapter."""
