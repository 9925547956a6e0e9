"""A linear layer with a bias, as in the paper.

Source: VILA, arXiv:2312.07533, section 3.1.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_vlm.config.activations import Activations
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.operations import Operations
from megatron_vlm.config.parameter_sizes import linear_sizes, prefixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A linear projection: one image token per patch."""

    type: Literal["linear"] = "linear"

    def token_grid(self, patches: Grid) -> Grid:
        """Return the grid of patches; each patch becomes one token."""
        return patches

    def parameter_sizes(self, input_size: int, output_size: int) -> dict[str, int]:
        """Return the parameters of the layer."""
        return prefixed("encoder", linear_sizes(input_size, output_size))

    def operations(self, patches: Grid, input_size: int, output_size: int) -> Operations:
        """Return the operations for one image with these patches."""
        return Operations(entry=2 * patches.size * input_size * output_size)

    def activations(self, patches: Grid, input_size: int, output_size: int, *, learns: bool) -> Activations:
        """Return the activations for one image; the input is kept for the gradient of the weights."""
        return Activations(kept=patches.size * input_size if learns else 0, working=patches.size * output_size)
