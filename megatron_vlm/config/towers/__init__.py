"""Vision towers: each module is a tower, named in `model.vision.type`, and offers the dataclass `Config`.

The module of the same name in `models/towers/` builds it.
"""

from typing import Annotated, Protocol

from megatron_vlm.config.grid import Grid
from megatron_vlm.config.loading import PartOf
from megatron_vlm.config.operations import Operations


class TowerConfig(Protocol):
    """What every tower says about itself: its settings, its patches, its parameters and its operations."""

    @property
    def type(self) -> str:
        """Name of the module."""

    @property
    def image_size(self) -> int:
        """Side of the square image that the tower is fed [pixels]."""

    @property
    def image_mean(self) -> tuple[float, float, float]:
        """Mean of red, green and blue that is subtracted from pixels between 0 and 1."""

    @property
    def image_std(self) -> tuple[float, float, float]:
        """Standard deviation of red, green and blue that the difference is divided by."""

    @property
    def init_method_std(self) -> float:
        """Standard deviation of the initial weights, those of the projection included."""

    @property
    def feature_size(self) -> int:
        """Width of the features that the tower hands on."""

    @property
    def constant_grid(self) -> Grid | None:
        """Patches of every image; None for a tower whose patches depend on the size of the image."""

    def patch_grid(self, width: int, height: int) -> Grid:
        """Return the patches of an image of this size, as stored [pixels]."""

    @property
    def num_parameters(self) -> int:
        """Parameters of the tower."""

    def operations(self, patches: Grid) -> Operations:
        """Return the operations on one image of so many patches."""


Tower = Annotated[TowerConfig, PartOf("megatron_vlm.config.towers", default="clip")]
"""Type of a settings field that holds a tower."""
