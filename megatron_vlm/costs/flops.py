"""Floating-point operations of a step: useful work only, without padding or recomputation.

Each part counts its own forward pass (`operations` in `config/`). This module combines the parts and works out how much
of the backward pass remains if some are frozen.
"""

from dataclasses import asdict, dataclass

from megatron_vlm.config import PART_NAMES, ModelConfig
from megatron_vlm.config.operations import Operations


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The amount of work in a micro-batch, a step or a whole run; means need not be whole numbers."""

    num_tokens: float
    """Positions without padding."""
    attention_pairs: float
    """Query-key pairs that causal attention inside the samples computes."""
    num_labels: float
    """Positions with logits."""
    num_images: float

    def times(self, factor: float) -> "Work":
        """Return `factor` times this work; the counts need not stay whole."""
        return Work(**{name: factor * value for name, value in asdict(self).items()})


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Operations of a forward and backward pass."""

    tower: float
    projection: float
    decoder: float
    """The decoder layers."""
    output: float
    """The output layer."""

    @property
    def total(self) -> float:
        """Total operations."""
        return self.tower + self.projection + self.decoder + self.output


def step_flops(model: ModelConfig, freeze: tuple[str, ...], work: Work) -> StepFlops:
    """Return the operations of an optimizer step: the forward pass and what is needed of the backward.

    Gradients flow from the loss back to the first part that learns. A frozen part on the way computes the gradient of
    its input but not of its weights; a frozen part before the first one that learns has no backward pass.

    Args:
        model: sizes of the parts.
        freeze: parts that do not learn.
        work: tokens, images and labels of the step.

    Raises:
        ConfigError: the number of patches depends on the image size.
    """
    adapter, learns_before, counted = model.adapter, False, []
    for part, forward, num_positions in _forward(model, work):
        learns, adapted = part not in freeze, adapter is not None and part in adapter.parts
        flops = forward.training(learns=learns, input_gradient=learns_before, has_adapter=adapted)
        if adapter is not None and adapted:
            added = adapter.operations(model, part, num_positions)
            flops += added.training(learns=True, input_gradient=learns_before)
        counted.append(flops)
        learns_before = learns_before or learns or adapted
    return StepFlops(*counted)


def _forward(model: ModelConfig, work: Work) -> list[tuple[str, Operations, float]]:
    """Return part, forward operations and positions seen by an adapter, for each field of `StepFlops`."""
    patches = model.fixed_patches("the count of operations")
    sizes = model.vision.feature_size, model.language.hidden_size
    layer = model.language.layer_operations(work.num_tokens, work.attention_pairs)
    vision_model, vision_projection, language_model = PART_NAMES
    num_patches = work.num_images * patches.size
    return [
        (vision_model, model.vision.operations(patches).times(work.num_images), num_patches),
        (vision_projection, model.projection.operations(patches, *sizes).times(work.num_images), num_patches),
        (language_model, layer.times(model.language.num_layers), work.num_tokens),
        (language_model, model.language.output_operations(work.num_labels), 0),
    ]
