"""Scaling on scales: another tower sees the image at several sizes, the larger ones tile by tile.

Source: S2, arXiv:2403.13043, and its code in bfshi/scaling_on_scales.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from torch import Tensor

from megatron_vlm.config.grid import Grid
from megatron_vlm.config.modules import find_module
from megatron_vlm.config.towers.s2 import Config
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.layers.pixels import PixelNormaliser
from megatron_vlm.models.layers.replicas import ReplicaGroups, Replicated


def build(config: Config, computation: Computation, groups: ReplicaGroups) -> "ScaledTower":
    """Build the inner tower and what surrounds it."""
    module = find_module("megatron_vlm.models.towers", config.tower.type, "model.vision.tower.type")
    return ScaledTower(config, module.build(config.tower, computation, groups), groups)


class ScaledTower(Replicated):
    """Maps pixels to the features of all scales, side by side in the channels.

    Its checkpoints hold the tensors of the inner tower under the same keys as without `s2`: the weights of one model
    start the other.

    Args:
        vision_config: the scales.
        tower: maps float[n, 3, t, t] tiles to float[n, p, c].
        groups: process groups of the tower.
    """

    def __init__(self, vision_config: Config, tower: Replicated, groups: ReplicaGroups) -> None:
        super().__init__(config=tower.config)
        self.vision_config, self.tower = vision_config, tower
        self.groups, self.tp_group = groups, groups.tensor
        self._normalise = PixelNormaliser(vision_config.image_mean, vision_config.image_std)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the state for a checkpoint, under the keys of the inner tower."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        replace_prefix_for_sharding(state, f"{prefix}tower.", prefix)
        return state

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixel_values: uint8[n, 3, S, S] as loaded, or float if already normalised; S is the largest scale.

        Returns:
            float[n, p, scales * c]; the features are row by row.
        """
        config, images = self.vision_config, self._normalise(pixel_values).float()
        dtype = self.config.params_dtype
        tiles = [
            split_into_tiles(_resize(images, scale).to(dtype), number)
            for scale, number in zip(config.scales, config.tiles_per_side, strict=True)
        ]
        # One call for the tiles of all scales, which have one size.
        by_scale = self.tower(torch.cat(tiles)).split([len(scale) for scale in tiles])
        merged = [
            merge_tiles(features, number, config.tile_grid, config.constant_grid)
            for features, number in zip(by_scale, config.tiles_per_side, strict=True)
        ]
        return torch.cat(merged, dim=-1)


def _resize(images: Tensor, scale: int) -> Tensor:
    if images.size(-1) == scale:
        return images
    return F.interpolate(images, size=(scale, scale), mode="bicubic", align_corners=False)


def split_into_tiles(images: Tensor, number: int) -> Tensor:
    """Cut images into tiles.

    Args:
        images: float[n, 3, S, S].
        number: tiles along a side.

    Returns:
        float[number**2 * n, 3, S / number, S / number]; the tiles are row by row, and each stands for all images.
    """
    n, channels, side, _ = images.shape
    tile = side // number
    tiles = images.view(n, channels, number, tile, number, tile).permute(2, 4, 0, 1, 3, 5)
    return tiles.reshape(number**2 * n, channels, tile, tile)


def merge_tiles(features: Tensor, number: int, tile: Grid, wanted: Grid) -> Tensor:
    """Put the features of tiles together and average them down to a grid.

    Args:
        features: float[number**2 * n, p, c], in the order of `split_into_tiles`.
        number: tiles along a side.
        tile: the p features of a tile; those before the patches are averaged over the tiles of an image.
        wanted: the grid, whose rows and columns divide those of all tiles together.

    Returns:
        float[n, wanted.size, c].
    """
    n, channels = features.size(0) // number**2, features.size(-1)
    prefix, patches = features.tensor_split([tile.num_prefix_tokens], dim=1)
    merged = patches.reshape(number, number, n, tile.rows, tile.columns, channels).permute(2, 0, 3, 1, 4, 5)
    window = number * tile.rows // wanted.rows
    windows = merged.reshape(n, wanted.rows, window, wanted.columns, window, channels)
    # Interpolation by area; unlike torch's pooling, the mean keeps nothing for the backward pass.
    patches = _mean(windows, (2, 4)).view(n, wanted.num_patches, channels)
    if not tile.num_prefix_tokens:
        return patches
    prefix = _mean(prefix.reshape(number**2, n, tile.num_prefix_tokens, channels), (0,))
    return torch.cat([prefix.view(n, -1, channels), patches], dim=1)


def _mean(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the mean, summed in float32; the tensor itself where there is one of each."""
    if all(x.size(dim) == 1 for dim in dims):
        return x
    return x.mean(dim=dims, dtype=torch.float32).to(x.dtype)
