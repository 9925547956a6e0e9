"""Scaling on scales: another tower sees the image at several sizes, the larger ones tile by tile.

Source: S2, arXiv:2403.13043, section 2.1; VILA1.5-3b-s2 has scales of 384 and 768 pixels over SigLIP.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from megatron_vlm.config.activations import Activations
from megatron_vlm.config.errors import ConfigError
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.operations import Operations
from megatron_vlm.config.parameter_sizes import prefixed
from megatron_vlm.config.towers import Tower


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The scales and the tower that sees them; the features of all scales stand side by side in the channels.

    The grid of features is that of the smallest scale; larger ones are averaged down to it. A class token that the
    tower keeps is the mean over the tiles of a scale.
    """

    type: Literal["s2"] = "s2"
    scales: tuple[int, ...]
    """Sides of the square image, the smallest first [pixels]. Each is a multiple of the first, and the first one of
    `tower.image_size`: a scale is cut into tiles of that size. Images are loaded at the largest."""
    tower: Tower
    """The tower that sees every tile, with weights of its own only: `s2` adds none."""

    def __post_init__(self) -> None:
        tile = self.tower.image_size
        if not self.scales or any(low >= high for low, high in pairwise((0, *self.scales))):
            raise ConfigError(
                f"model.vision.scales={list(self.scales)} is not a rising list of sizes", fix="name the smallest first"
            )
        if self.scales[0] % tile or any(scale % self.scales[0] for scale in self.scales):
            raise ConfigError(
                f"model.vision.scales={list(self.scales)} does not fit tiles of tower.image_size={tile} pixels",
                fix=f"use multiples of the first, e.g. [{tile}, {2 * tile}]",
            )

    @property
    def tiles_per_side(self) -> tuple[int, ...]:
        """Tiles along a side of the image, at each scale."""
        return tuple(scale // self.tower.image_size for scale in self.scales)

    @property
    def num_tiles(self) -> int:
        """Tiles of an image at all scales."""
        return sum(number**2 for number in self.tiles_per_side)

    @property
    def tile_grid(self) -> Grid:
        """Features of a tile."""
        return self.tower.patch_grid(self.tower.image_size, self.tower.image_size)

    @property
    def image_size(self) -> int:
        """Side of the largest scale [pixels]."""
        return self.scales[-1]

    @property
    def image_mean(self) -> tuple[float, float, float]:
        """Mean of red, green and blue of the tower."""
        return self.tower.image_mean

    @property
    def image_std(self) -> tuple[float, float, float]:
        """Standard deviation of red, green and blue of the tower."""
        return self.tower.image_std

    @property
    def init_method_std(self) -> float:
        """Standard deviation of the initial weights of the tower."""
        return self.tower.init_method_std

    @property
    def feature_size(self) -> int:
        """Width of the features of all scales together."""
        return len(self.scales) * self.tower.feature_size

    @property
    def constant_grid(self) -> Grid:
        """Features of every image."""
        number, tile = self.tiles_per_side[0], self.tile_grid
        return Grid(number * tile.rows, number * tile.columns, tile.num_prefix_tokens)

    def patch_grid(self, width: int, height: int) -> Grid:
        """Return the features of an image; the same for all sizes, because every image is first made square."""
        return self.constant_grid

    @property
    def parameter_sizes(self) -> dict[str, int]:
        """Parameters of the tower."""
        return prefixed("tower", self.tower.parameter_sizes)

    @property
    def no_weight_decay(self) -> tuple[str, ...]:
        """Those of the tower."""
        return tuple(f"tower.{name}" for name in self.tower.no_weight_decay)

    def check_tensor_parallel(self, size: int) -> None:
        """Check the tower."""
        self.tower.check_tensor_parallel(size)

    @property
    def split_parameters(self) -> tuple[str, ...]:
        """Those of the tower."""
        return tuple(f"tower.{name}" for name in self.tower.split_parameters)

    def summed_numbers(self, patches: Grid) -> int:
        """Return those of all tiles of an image."""
        return self.num_tiles * self.tower.summed_numbers(self.tile_grid)

    def operations(self, patches: Grid) -> Operations:
        """Return the operations for one image."""
        return self.tower.operations(self.tile_grid).times(self.num_tiles)

    def activations(
        self, patches: Grid, *, learns: bool, recompute: bool, tensor_parallel_size: int = 1
    ) -> Activations:
        """Return the activations for one image; putting tiles together keeps nothing."""
        tile = self.tower.activations(
            self.tile_grid, learns=learns, recompute=recompute, tensor_parallel_size=tensor_parallel_size
        )
        return tile.times(self.num_tiles)
