"""Two linear layers with an exact GELU between them, as in LLaVA-1.5 and the released VILA weights.

Source: LLaVA-1.5, arXiv:2310.03744, section 3.3.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_vlm.config.activations import Activations
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.operations import Operations
from megatron_vlm.config.parameter_sizes import linear_sizes, prefixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A projection of two layers, both as wide as the language model: one image token per patch."""

    type: Literal["mlp2x_gelu"] = "mlp2x_gelu"

    def token_grid(self, patches: Grid) -> Grid:
        """Return the grid of patches; each patch becomes one token."""
        return patches

    def parameter_sizes(self, input_size: int, output_size: int) -> dict[str, int]:
        """Return the parameters of both layers."""
        return {
            **prefixed("encoder.linear_fc1", linear_sizes(input_size, output_size)),
            **prefixed("encoder.linear_fc2", linear_sizes(output_size, output_size)),
        }

    def operations(self, patches: Grid, input_size: int, output_size: int) -> Operations:
        """Return the operations for one image with these patches."""
        return Operations(
            entry=2 * patches.size * input_size * output_size, inner=2 * patches.size * output_size * output_size
        )

    def activations(self, patches: Grid, input_size: int, output_size: int, *, learns: bool) -> Activations:
        """Return the activations for one image: the inputs of both layers and of the GELU."""
        kept = output_size + (input_size + output_size if learns else 0)
        return Activations(kept=patches.size * kept, working=2 * patches.size * output_size)
