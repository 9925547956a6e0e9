"""Projections: each module is one, named in `model.projection.type`, and offers the dataclass `Config`.

The module of the same name in `models/projectors/` builds it.
"""

from typing import Annotated, Protocol

from megatron_vlm.config.grid import Grid
from megatron_vlm.config.loading import PartOf
from megatron_vlm.config.modules import find_module
from megatron_vlm.config.operations import Operations


class ProjectorConfig(Protocol):
    """What every projection says about itself: its tokens, its parameters and its operations."""

    @property
    def type(self) -> str:
        """Name of the module."""

    def token_grid(self, patches: Grid) -> Grid:
        """Return the image tokens that a grid of patches becomes."""

    def num_parameters(self, input_size: int, output_size: int) -> int:
        """Return the parameters between features and embeddings of these widths."""

    def operations(self, patches: Grid, input_size: int, output_size: int) -> Operations:
        """Return the operations on one image of so many patches, between these widths."""


Projector = Annotated[ProjectorConfig, PartOf("megatron_vlm.config.projectors", default="linear")]
"""Type of a settings field that holds a projection."""


def make_projector(type: str, **settings: object) -> ProjectorConfig:
    """Return the settings of a projection of this type.

    Raises:
        ConfigError: there is no such type.
    """
    return find_module(__name__, type, "model.projection.type").Config(**settings)
