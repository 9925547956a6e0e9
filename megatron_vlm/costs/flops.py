"""Floating-point operations that a step has to do: real patches and real samples, no padding, no recomputation.

Each part counts its own forward pass (`operations` in `config/`); here the parts of a step are put together, and what
of the backward pass is left where some of them are frozen.
"""

from dataclasses import dataclass

from megatron_vlm.config import PART_NAMES, ModelConfig
from megatron_vlm.config.operations import Operations


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the operations of a step, or of a whole run, depend on."""

    num_tokens: int
    """Positions that hold something."""
    attention_pairs: int
    """Query-key pairs that causal attention inside the samples looks at."""
    num_labels: int
    """Positions whose logits are computed."""
    num_images: int


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Operations of forward and backward pass, by what does them."""

    tower: float
    projection: float
    decoder: float
    """The decoder layers."""
    output: float
    """The output layer."""

    @property
    def total(self) -> float:
        """Operations of all parts."""
        return self.tower + self.projection + self.decoder + self.output


def step_flops(model: ModelConfig, freeze: tuple[str, ...], work: Work) -> StepFlops:
    """Return the operations of an optimizer step: forward, and what of the backward pass the frozen parts leave.

    Gradients go from the loss back to the first part that learns. A frozen part on this way computes the gradient of
    its input, not of its weights; a frozen part before it computes nothing in the backward pass.

    Args:
        model: sizes of the parts.
        freeze: parts that do not learn.
        work: what the step holds.

    Raises:
        ConfigError: the images of the model have different sizes.
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


def _forward(model: ModelConfig, work: Work) -> list[tuple[str, Operations, int]]:
    """Return for each field of `StepFlops` its part, the forward operations and the positions an adapter would see."""
    patches, sizes = (
        model.fixed_patches("the count of operations"),
        (model.vision.feature_size, model.language.hidden_size),
    )
    layer = model.language.layer_operations(work.num_tokens, work.attention_pairs)
    vision_model, vision_projection, language_model = PART_NAMES
    num_patches = work.num_images * patches.size
    return [
        (vision_model, model.vision.operations(patches).times(work.num_images), num_patches),
        (vision_projection, model.projection.operations(patches, *sizes).times(work.num_images), num_patches),
        (language_model, layer.times(model.language.num_layers), work.num_tokens),
        (language_model, model.language.output_operations(work.num_labels), 0),
    ]
