"""Neighbouring patches of an image, side by side in one token."""

import torch.nn.functional as F
from torch import Tensor

from megatron_vlm.config.grid import Grid, TokenOrder


def merge_patches(features: Tensor, patches: Grid, token_order: TokenOrder) -> Tensor:
    """Put 2 x 2 neighbouring patches into one token: upper left, upper right, lower left, lower right.

    A grid with an odd side is first padded with zeros below and to the right.

    Args:
        features: float[n, rows * columns, c], row by row.
        patches: their grid.
        token_order: order of the tokens.

    Returns:
        float[n, t, 4 * c], with t tokens as in `Grid.merged`.

    Source: VILA-1.5; the order of the tokens is explained in `config/projectors/mlp_downsample.py`.
    """
    num_images, channels = features.size(0), features.size(-1)
    x = features.reshape(num_images, patches.rows, patches.columns, channels)
    x = F.pad(x, (0, 0, 0, patches.columns % 2, 0, patches.rows % 2))
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [n, rows, 2, columns, 2, c]
    first, second = (1, 3) if token_order == "row" else (3, 1)
    return x.permute(0, first, second, 2, 4, 5).reshape(num_images, -1, 4 * channels)
