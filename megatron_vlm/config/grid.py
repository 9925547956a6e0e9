"""The grid of features that an image becomes, in the tower and after the projection."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows and columns of features, stored row by row."""

    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Number of features."""
        return self.rows * self.columns
