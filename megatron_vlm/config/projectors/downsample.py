"""2 x 2 neighbouring patches side by side, then one linear layer: the paper's downsampling.

Source: VILA, arXiv:2312.07533, section 3.3 and Table 7.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_vlm.config.activations import Activations
from megatron_vlm.config.grid import Grid, TokenOrder
from megatron_vlm.config.operations import Operations
from megatron_vlm.config.parameter_sizes import linear_sizes, prefixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A linear projection of merged patches: one image token per 2 x 2 patches."""

    type: Literal["downsample"] = "downsample"
    token_order: TokenOrder = "row"
    """Order of the image tokens: row by row or column by column."""

    def token_grid(self, patches: Grid) -> Grid:
        """Return the grid of merged patches; raises ConfigError if the tower keeps its class token."""
        return patches.only_patches("the projection downsample").merged()

    def parameter_sizes(self, input_size: int, output_size: int) -> dict[str, int]:
        """Return the parameters of the layer."""
        return prefixed("encoder", linear_sizes(4 * input_size, output_size))

    def operations(self, patches: Grid, input_size: int, output_size: int) -> Operations:
        """Return the operations for one image with these patches."""
        return Operations(entry=2 * self.token_grid(patches).size * 4 * input_size * output_size)

    def activations(self, patches: Grid, input_size: int, output_size: int, *, learns: bool) -> Activations:
        """Return the activations for one image; the merged patches are kept for the gradient of the weights."""
        tokens = self.token_grid(patches).size
        return Activations(kept=tokens * 4 * input_size if learns else 0, working=tokens * output_size)
