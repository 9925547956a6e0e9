"""The model: its three parts, and the number of tokens an image takes."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from megatron_vlm.config.adapters import Adapter
from megatron_vlm.config.comparison import FREE, IN_NEW_STAGE
from megatron_vlm.config.errors import ConfigError
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.language import LanguageConfig
from megatron_vlm.config.projectors import Projector
from megatron_vlm.config.projectors.linear import Config as LinearConfig
from megatron_vlm.config.towers import Tower

IGNORE_INDEX = -100
"""Label of positions without a loss."""
PART_NAMES = ("vision_model", "vision_projection", "language_model")
"""The parts of the model in the order of the forward pass; checkpoints use these names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The three parts of the model, and an adapter."""

    PRESETS: ClassVar[str] = "megatron_vlm.config.presets.models"

    language: LanguageConfig
    vision: Annotated[Tower, IN_NEW_STAGE]
    projection: Annotated[Projector, IN_NEW_STAGE] = field(default_factory=LinearConfig)
    adapter: Adapter | None = None
    """Small weights added to the parts, to be trained in place of them; None for no adapter."""
    backend: Annotated[Literal["auto", "torch", "transformer_engine"], FREE] = "auto"
    """Layer implementation; auto picks transformer-engine if it is installed and there is a GPU."""

    def num_image_tokens(self, width: int, height: int) -> int:
        """Return the number of placeholders for an image; data and models both use this number.

        Args:
            width: width of the stored image [pixels].
            height: height of the stored image [pixels].
        """
        return self.projection.token_grid(self.vision.patch_grid(width, height)).size

    @property
    def constant_image_tokens(self) -> int | None:
        """Placeholders for every image; None if their number depends on the image size."""
        grid = self.vision.constant_grid
        return None if grid is None else self.projection.token_grid(grid).size

    def fixed_patches(self, what_needs_it: str) -> Grid:
        """Return the patches of every image, for code that requires the same number for all images.

        Args:
            what_needs_it: that code, for the error.

        Raises:
            ConfigError: the number of patches depends on the image size.
        """
        grid = self.vision.constant_grid
        if grid is None:
            raise ConfigError(
                f"{what_needs_it} needs the same number of tokens for every image",
                where="model.vision",
                fix="use a tower with a fixed input size",
            )
        return grid

    def fixed_image_tokens(self, what_needs_it: str) -> int:
        """Return the number of placeholders of every image; raises like `fixed_patches`."""
        return self.projection.token_grid(self.fixed_patches(what_needs_it)).size
