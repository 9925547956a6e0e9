"""Floating-point operations of a step: useful work only, without padding or recomputation.

Each part counts its own forward pass (`operations` in `config/`). This module combines the parts and works out how much
of the backward pass remains if some are frozen.
"""

from dataclasses import asdict, dataclass

from megatron_vlm.config import PART_NAMES, LanguageConfig, ModelConfig
from megatron_vlm.config.language import LAYER_NAMES, MATRIX_NAMES
from megatron_vlm.config.learning import LearningLayer, learning_of
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
    layers: tuple[float, ...]
    """Each decoder layer."""
    output: float
    """The output layer."""

    @property
    def total(self) -> float:
        """Total operations."""
        return self.tower + self.projection + sum(self.layers) + self.output


def step_flops(model: ModelConfig, freeze: tuple[str, ...], work: Work) -> StepFlops:
    """Return the operations of an optimizer step: the forward pass and what is needed of the backward.

    Gradients flow from the loss back to the first parameter that learns. What is frozen on the way computes the
    gradient of its input but not of its weights; what is frozen before it has no backward pass. Inside the decoder this
    is exact; a tower or projection frozen in part counts as if all its weights behind the first that learns did, and a
    decoder layer with an adapter as if the gradient reached its input.

    Args:
        model: sizes of the parts.
        freeze: patterns of parameters that do not learn, as in `training.freeze`.
        work: tokens, images and labels of the step.

    Raises:
        ConfigError: the number of patches depends on the image size.
    """
    learning = learning_of(model, freeze)
    vision, flows = [], False
    for position, (part, forward) in enumerate(_vision_forward(model, work)):
        learns, adapted = learning.parts[position], model.adapter is not None and part in model.adapter.parts
        flops = forward.training(learns=learns, input_gradient=flows, has_adapter=adapted)
        if learns and not flows and not adapted:
            flops = forward.forward + learning.shares[position] * (flops - forward.forward)
        vision.append(flops + _adapter(model, part, work, input_gradient=flows))
        flows = flows or learns or adapted
    tower, projection = vision
    added = _adapter(model, PART_NAMES[-1], work, input_gradient=flows) / model.language.num_layers
    layers = tuple(_layer(model.language, layer, work) + added for layer in learning.layers)
    output = model.language.output_operations(work.num_labels).training(
        learns=learning.output, input_gradient=learning.input_gradient_of_output
    )
    return StepFlops(tower, projection, layers, output)


def _vision_forward(model: ModelConfig, work: Work) -> list[tuple[str, Operations]]:
    patches = model.fixed_patches("the count of operations")
    sizes = model.vision.feature_size, model.language.hidden_size
    return [
        (PART_NAMES[0], model.vision.operations(patches).times(work.num_images)),
        (PART_NAMES[1], model.projection.operations(patches, *sizes).times(work.num_images)),
    ]


def _adapter(model: ModelConfig, part: str, work: Work, *, input_gradient: bool) -> float:
    adapter = model.adapter
    if adapter is None or part not in adapter.parts:
        return 0.0
    patches = model.fixed_patches("the count of operations")
    num_positions = work.num_tokens if part == PART_NAMES[-1] else work.num_images * patches.size
    image_tokens = work.num_images * model.projection.token_grid(patches).size
    added = adapter.operations(model, part, num_positions, image_tokens)
    return added.training(learns=True, input_gradient=input_gradient)


def _layer(language: LanguageConfig, layer: LearningLayer, work: Work) -> float:
    """Return the operations of one decoder layer, following the gradient from its input to its output."""
    total, flows = 0.0, layer.input_gradient or layer.adapter
    matrices = dict(zip(MATRIX_NAMES, language.layer_matrices(), strict=True))
    for name, learns in zip(LAYER_NAMES, layer.weights, strict=True):
        if name in matrices:
            inputs, outputs = matrices[name]
            total += (1 + learns + flows) * 2.0 * work.num_tokens * inputs * outputs
        flows = flows or learns
        if name == "self_attention.linear_qkv.weight":
            total += (1 + 2 * flows) * language.layer_operations(0, work.attention_pairs).attention
    return total
