"""The cells into which a tower and a projection divide an image."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows and columns of features, read row by row."""

    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Cells of the grid."""
        return self.rows * self.columns
