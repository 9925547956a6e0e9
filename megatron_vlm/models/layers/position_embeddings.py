"""Learned position embeddings of a grid of patches."""

import math
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

Mode = Literal["bicubic", "bilinear"]


def resize_positions(
    table: Tensor, side: int, rows: int, columns: int, *, mode: Mode = "bicubic", antialias: bool = False
) -> Tensor:
    """Resize the embeddings of a square grid to another one, by interpolation in two dimensions.

    Args:
        table: float[side * side, h]; row by row.
        side: rows and columns of the table.
        rows: of the new grid.
        columns: of the new grid.
        mode: of the interpolation.
        antialias: smooth them first if the new grid is smaller.

    Returns:
        float[rows * columns, h]; the table itself if the grid is the same.
    """
    if (rows, columns) == (side, side):
        return table
    square = table.float().view(side, side, -1)
    if table.requires_grad and torch.are_deterministic_algorithms_enabled():
        # As products: on a GPU, torch has no deterministic gradient of its interpolation.
        of_rows, of_columns = (_filter(side, size, mode, antialias, table.device) for size in (rows, columns))
        resized = of_columns @ torch.tensordot(of_rows, square, dims=1)
    else:
        image = square.permute(2, 0, 1)[None]
        resized = F.interpolate(
            image, size=(rows, columns), mode=mode, align_corners=False, antialias=antialias
        ).permute(0, 2, 3, 1)
    return resized.reshape(rows * columns, -1).to(table.dtype)


def _filter(side: int, size: int, mode: Mode, antialias: bool, device: torch.device) -> Tensor:
    """Return the filter along one axis as a matrix float[size, side]."""
    identity = torch.eye(side, device=device)[None, None]
    filtered = F.interpolate(identity, size=(size, side), mode=mode, align_corners=False, antialias=antialias)
    return filtered[0, 0]


@runtime_checkable
class Resizable(Protocol):
    """A module with one parameter, `weight`, that can be made from that of a model for images of another size."""

    weight: Tensor

    def can_resize(self, shape: tuple[int, ...]) -> bool:
        """Return whether a weight of this shape is that of another image size."""

    def resize(self, stored: Tensor) -> Tensor:
        """Return the weight for this image size, in the dtype of `weight`."""


class PositionEmbeddings(torch.nn.Embedding):
    """One embedding for each class token and each patch of a square grid.

    Args:
        grid: patches along a side.
        num_class_tokens: embeddings before those of the patches.
        hidden_size: width of an embedding.
        dtype: of the weights.
        antialias: as in `resize_positions`.
    """

    def __init__(
        self, grid: int, num_class_tokens: int, hidden_size: int, dtype: torch.dtype, *, antialias: bool = False
    ) -> None:
        super().__init__(grid**2 + num_class_tokens, hidden_size, dtype=dtype)
        self.grid, self.num_class_tokens, self.antialias = grid, num_class_tokens, antialias

    def forward(self, rows: int, columns: int) -> Tensor:  # type: ignore[override]
        """Return float[class tokens + rows * columns, h], interpolated if the grid of the image is another one."""
        if (rows, columns) == (self.grid, self.grid):
            return self.weight
        return self._resize(self.weight, self.grid, rows, columns)

    def can_resize(self, shape: tuple[int, ...]) -> bool:
        """Return whether a weight of this shape is that of another square grid."""
        num_patches = shape[0] - self.num_class_tokens
        return num_patches > 0 and math.isqrt(num_patches) ** 2 == num_patches and shape[1:] == self.weight.shape[1:]

    def resize(self, stored: Tensor) -> Tensor:
        """Return the weight for this grid from that of another one."""
        side = math.isqrt(stored.size(0) - self.num_class_tokens)
        return self._resize(stored, side, self.grid, self.grid).to(self.weight.dtype)

    def _resize(self, weight: Tensor, side: int, rows: int, columns: int) -> Tensor:
        class_tokens, table = weight.tensor_split([self.num_class_tokens])
        resized = resize_positions(table, side, rows, columns, antialias=self.antialias)
        return torch.cat([class_tokens, resized])
