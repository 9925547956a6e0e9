"""What one part of the model holds for its backward pass, beside weights and gradients."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Numbers in the precision of the model; FP32 numbers in a BF16 model count as two."""

    kept: float = 0.0
    """Kept from the forward to the backward pass."""
    working: float = 0.0
    """Held for a moment during the backward pass, at its most."""

    def times(self, count: float) -> "Activations":
        """Return what `count` inputs keep; they are worked on one after the other."""
        return Activations(kept=count * self.kept, working=self.working)

    def recomputed(self, count: int, num_inputs: float) -> "Activations":
        """Return what `count` layers like this one hold if each is computed again in the backward pass.

        Args:
            count: layers.
            num_inputs: numbers in the input of a layer, all that is kept of it.
        """
        return Activations(kept=count * num_inputs, working=self.kept + self.working)
