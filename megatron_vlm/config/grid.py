"""The features that an image becomes, in the tower and after the projection."""

from dataclasses import dataclass
from typing import Literal

from megatron_vlm.config.errors import ConfigError

TokenOrder = Literal["row", "column"]
"""Order of the tokens of merged patches: row by row, or column by column."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows and columns of features, stored row by row; features of the whole image may stand before them."""

    rows: int
    columns: int
    num_prefix_tokens: int = 0
    """Features before the grid: a class token that the tower keeps."""

    @property
    def num_patches(self) -> int:
        """Number of features in rows and columns."""
        return self.rows * self.columns

    @property
    def size(self) -> int:
        """Number of features."""
        return self.num_prefix_tokens + self.num_patches

    def only_patches(self, what_needs_it: str) -> "Grid":
        """Return the grid, for code that has no place for features outside rows and columns.

        Args:
            what_needs_it: that code, for the error.

        Raises:
            ConfigError: there are such features.
        """
        if self.num_prefix_tokens:
            raise ConfigError(
                f"{what_needs_it} merges neighbouring patches, but the tower also keeps its class token",
                where="model.vision.drop_class_token",
                fix="set it to true",
            )
        return self

    def merged(self) -> "Grid":
        """Return the grid of 2 x 2 neighbouring patches; a side of odd length gets one more row or column."""
        return Grid((self.rows + 1) // 2, (self.columns + 1) // 2)
