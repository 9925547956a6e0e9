"""Floating-point operations of one part of the model, sorted by what their backward pass costs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """Operations of a forward pass; a multiplication and an addition count as two.

    Each product of a matrix multiplication has two gradients, and each costs as much as the product. Which of them are
    computed depends on what learns, so the products are counted in three kinds.
    """

    entry: float = 0.0
    """Products of the part's own input with weights: the gradient of the input is for the part before."""
    inner: float = 0.0
    """Products of later activations with weights."""
    attention: float = 0.0
    """Products of activations with each other, which have no weights."""

    @property
    def forward(self) -> float:
        """All operations of the forward pass."""
        return self.entry + self.inner + self.attention

    def times(self, count: float) -> "Operations":
        """Return the operations of `count` equal inputs."""
        return Operations(entry=count * self.entry, inner=count * self.inner, attention=count * self.attention)

    def training(self, *, learns: bool, input_gradient: bool, has_adapter: bool = False) -> float:
        """Return the operations of a forward and a backward pass, without recomputation.

        Args:
            learns: the part's weights get gradients.
            input_gradient: a part before this one learns, so the gradient goes through to the part's input.
            has_adapter: weights that an adapter added to the part learn, so the gradient goes into the part.
        """
        flows = learns or input_gradient or has_adapter
        return (
            (1 + learns + input_gradient) * self.entry
            + (1 + learns + flows) * self.inner
            + (1 + 2 * flows) * self.attention
        )
