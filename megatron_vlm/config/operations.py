"""Floating-point operations of one part of the model, grouped by the cost of their backward pass."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """Operations of a forward pass; a multiplication and an addition count as two.

    A matrix product has two gradients, one for each factor, and each costs as much as the product itself. Which of them
    are computed depends on what learns, so the products fall into three groups.
    """

    entry: float = 0.0
    """Products of the part's input with weights; the gradient of the input is needed only by the previous part."""
    inner: float = 0.0
    """Products of activations inside the part with weights."""
    attention: float = 0.0
    """Products of two activations; no weights are involved."""
    gradient: float = 0.0
    """Products of gradients and activations for weights whose forward product takes the place of one counted already.
    """

    @property
    def forward(self) -> float:
        """Total operations of the forward pass."""
        return self.entry + self.inner + self.attention

    def times(self, count: float) -> "Operations":
        """Return the operations for `count` inputs like this one."""
        return Operations(**{name: count * value for name, value in asdict(self).items()})

    def training(self, *, learns: bool, input_gradient: bool, has_adapter: bool = False) -> float:
        """Return the operations of a forward and a backward pass, without recomputation.

        Args:
            learns: the weights of the part get gradients.
            input_gradient: an earlier part learns, so the gradient passes through to the input of this one.
            has_adapter: an adapter inside the part learns, so the gradient reaches into the part.
        """
        flows = learns or input_gradient or has_adapter
        return (
            (1 + learns + input_gradient) * self.entry
            + (1 + learns + flows) * self.inner
            + (1 + 2 * flows) * self.attention
            + learns * self.gradient
        )
