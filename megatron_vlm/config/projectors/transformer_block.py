"""Transformer layers in which every feature attends to every other, between two linear layers.

The paper compares a "Transformer block" with a linear layer (Table 1) and gives neither its width nor its depth: both
are settings. The features keep their number; what they need to know of their place is in them already.

Source: VILA, arXiv:2312.07533, section 3.1.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_vlm.config.activations import Activations
from megatron_vlm.config.checks import check_heads, check_positive, check_sizes
from megatron_vlm.config.comparison import Compared
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.operations import Operations
from megatron_vlm.config.parameter_sizes import linear_sizes, norm_sizes, prefixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Pre-norm layers with an exact GELU, a norm after the last one: one image token per feature."""

    type: Literal["transformer_block"] = "transformer_block"
    num_layers: int = 1
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: Annotated[int | None, Compared(stands_for="ffn_width")] = None
    """Width inside the MLP; None: four times `hidden_size`."""
    layernorm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        section = "model.projection"
        check_positive(section, self, "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
        check_sizes(section, self)
        check_heads(section, self.hidden_size, self.num_attention_heads, None)

    @property
    def ffn_width(self) -> int:
        """Width inside the MLP."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    def token_grid(self, patches: Grid) -> Grid:
        """Return the grid of patches; each feature becomes one token."""
        return patches

    def parameter_sizes(self, input_size: int, output_size: int) -> dict[str, int]:
        """Return the parameters of the two linear layers, the transformer layers and the last norm."""
        hidden, ffn = self.hidden_size, self.ffn_width
        layer = {
            **prefixed("input_layernorm", norm_sizes(hidden)),
            **prefixed("self_attention.linear_qkv", linear_sizes(hidden, 3 * hidden)),
            **prefixed("self_attention.linear_proj", linear_sizes(hidden, hidden)),
            **prefixed("pre_mlp_layernorm", norm_sizes(hidden)),
            **prefixed("mlp.linear_fc1", linear_sizes(hidden, ffn)),
            **prefixed("mlp.linear_fc2", linear_sizes(ffn, hidden)),
        }
        sizes = prefixed("linear_in.encoder", linear_sizes(input_size, hidden))
        for number in range(self.num_layers):
            sizes.update(prefixed(f"decoder.layers.{number}", layer))
        return {
            **sizes,
            **prefixed("norm", norm_sizes(hidden)),
            **prefixed("linear_out.encoder", linear_sizes(hidden, output_size)),
        }

    def operations(self, patches: Grid, input_size: int, output_size: int) -> Operations:
        """Return the operations for one image with these patches."""
        hidden, tokens = self.hidden_size, patches.size
        weights = self.num_layers * (4 * hidden * hidden + 2 * hidden * self.ffn_width) + hidden * output_size
        return Operations(
            entry=2 * tokens * input_size * hidden,
            inner=2 * tokens * weights,
            attention=self.num_layers * 4 * tokens * tokens * hidden,
        )

    def activations(self, patches: Grid, input_size: int, output_size: int, *, learns: bool) -> Activations:
        """Return the activations for one image, with flash attention."""
        hidden, ffn, tokens = self.hidden_size, self.ffn_width, patches.size
        # Inputs of the two norms and of the GELU, query, key, value and output of attention; inputs of the matrices.
        layer = 6 * hidden + ffn + (2 * hidden + ffn if learns else 0)
        ends = hidden + (input_size + hidden if learns else 0)
        return Activations(kept=tokens * (self.num_layers * layer + ends), working=tokens * (2 * ffn + hidden))
