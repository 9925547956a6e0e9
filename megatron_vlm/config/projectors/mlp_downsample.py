"""2 x 2 neighbouring patches side by side, a norm, and two linear layers with an exact GELU between them: VILA-1.5's.

Released weights of VILA-1.5 need `token_order: column`: its code emits the tokens column by column. The same projection
of NVILA and InternVL emits them row by row.

Source: VILA-1.5, https://github.com/NVlabs/VILA, llava/model/multimodal_projector/base_projector.py.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_vlm.config.activations import Activations
from megatron_vlm.config.grid import Grid, TokenOrder
from megatron_vlm.config.operations import Operations
from megatron_vlm.config.parameter_sizes import linear_sizes, norm_sizes, prefixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A projection of two layers, both as wide as the language model: one image token per 2 x 2 patches."""

    type: Literal["mlp_downsample"] = "mlp_downsample"
    token_order: TokenOrder = "row"
    """Order of the image tokens: row by row or column by column."""

    def token_grid(self, patches: Grid) -> Grid:
        """Return the grid of merged patches; raises ConfigError if the tower keeps its class token."""
        return patches.only_patches("the projection mlp_downsample").merged()

    def parameter_sizes(self, input_size: int, output_size: int) -> dict[str, int]:
        """Return the parameters of the norm and both layers."""
        return {
            **prefixed("norm", norm_sizes(4 * input_size)),
            **prefixed("mlp.encoder.linear_fc1", linear_sizes(4 * input_size, output_size)),
            **prefixed("mlp.encoder.linear_fc2", linear_sizes(output_size, output_size)),
        }

    def operations(self, patches: Grid, input_size: int, output_size: int) -> Operations:
        """Return the operations for one image with these patches."""
        tokens = self.token_grid(patches).size
        # The gradient of the first layer's input is needed for the weights of the norm, too.
        return Operations(inner=2 * tokens * output_size * (4 * input_size + output_size))

    def activations(self, patches: Grid, input_size: int, output_size: int, *, learns: bool) -> Activations:
        """Return the activations for one image: the inputs of the norm, both layers and the GELU."""
        kept = 4 * input_size + output_size + (4 * input_size + output_size if learns else 0)
        tokens = self.token_grid(patches).size
        return Activations(kept=tokens * kept, working=tokens * max(2 * output_size, output_size + 4 * input_size))
