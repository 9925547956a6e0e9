"""Projections, one module each, chosen by `model.projection.type`; a module defines the frozen dataclass `Config`.

The module of the same name in `models/projectors/` builds the projection.
"""

from dataclasses import MISSING, fields
from typing import Annotated, Protocol

from megatron_vlm.config.activations import Activations
from megatron_vlm.config.errors import ConfigError
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.loading import TypeIn
from megatron_vlm.config.modules import find_module
from megatron_vlm.config.operations import Operations


class ProjectorConfig(Protocol):
    """Settings of a projection, and what follows from them: image tokens, parameters, operations and activations."""

    @property
    def type(self) -> str:
        """Name of the module."""

    def token_grid(self, patches: Grid) -> Grid:
        """Return the grid of image tokens made from a grid of patches."""

    def parameter_sizes(self, input_size: int, output_size: int) -> dict[str, int]:
        """Return the size of every parameter by its name in the built projection, in the order of the forward pass.

        Args:
            input_size: width of the features.
            output_size: width of the embeddings.
        """

    def operations(self, patches: Grid, input_size: int, output_size: int) -> Operations:
        """Return the operations for one image with these patches and widths."""

    def activations(self, patches: Grid, input_size: int, output_size: int, *, learns: bool) -> Activations:
        """Return the activations for one image; if the weights do not learn, something before or inside does."""


Projector = Annotated[ProjectorConfig, TypeIn("megatron_vlm.config.projectors", default="linear")]
"""Annotation for a settings field that holds a projection."""


def make_projector(type: str, **settings: object) -> ProjectorConfig:
    """Return the settings of a projection of the given type.

    Raises:
        ConfigError: there is no such type, or it needs settings that are not given.
    """
    config = find_module(__name__, type, "model.projection.type").Config
    required = [field.name for field in fields(config) if field.default is MISSING and field.default_factory is MISSING]
    missing = [name for name in required if name not in settings]
    if missing:
        raise ConfigError(
            f"a projection of type {type} needs {', '.join(missing)}",
            where="model.projection",
            fix="set them in a config, and name it",
        )
    return config(**settings)
