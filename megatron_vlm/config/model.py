"""What the model is: its three parts, and how many tokens an image takes."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_vlm.config.adapters import Adapter
from megatron_vlm.config.errors import ConfigError
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.language import LanguageConfig
from megatron_vlm.config.projectors import Projector
from megatron_vlm.config.projectors.linear import Config as LinearConfig
from megatron_vlm.config.towers import Tower

IGNORE_INDEX = -100
"""Label of a position without a loss."""
PART_NAMES = ("vision_model", "vision_projection", "language_model")
"""The parts of the model, in the order that an image passes them; they are named so in checkpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The three parts of the model and what is added to them."""

    language: LanguageConfig
    vision: Tower
    projection: Projector = field(default_factory=LinearConfig)
    adapter: Adapter | None = None
    """Weights added to the parts, which learn while the parts rest; None: none."""
    backend: Literal["auto", "torch", "transformer_engine"] = "auto"
    """Layer implementation; auto takes transformer-engine where it imports and a GPU is there."""

    def num_image_tokens(self, width: int, height: int) -> int:
        """Return the placeholders of an image in the language model; data and models both ask here.

        Args:
            width: of the image as it is stored [pixels].
            height: likewise.
        """
        return self.projection.token_grid(self.vision.patch_grid(width, height)).size

    @property
    def constant_image_tokens(self) -> int | None:
        """Placeholders of every image; None where their number depends on the size of the image."""
        grid = self.vision.constant_grid
        return None if grid is None else self.projection.token_grid(grid).size

    def fixed_patches(self, what_needs_it: str) -> Grid:
        """Return the patches of every image, for code that handles images of one size only.

        Raises:
            ConfigError: the patches depend on the size of the image; names what cannot handle that.
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
        """Return the placeholders of every image; raises as `fixed_patches`."""
        return self.projection.token_grid(self.fixed_patches(what_needs_it)).size
