"""What learns: which parameters get gradients, and how far back the gradient of the loss flows."""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

from megatron_vlm.config.language import LAYER_NAMES
from megatron_vlm.config.model import PART_NAMES, ModelConfig
from megatron_vlm.config.patterns import matches_any, parameter_sizes


@dataclass(frozen=True, slots=True)
class LearningLayer:
    """A decoder layer."""

    weights: tuple[bool, ...]
    """For each of `LAYER_NAMES`, whether it learns."""
    input_gradient: bool
    """Whether something before the layer learns, so that the gradient passes through all of it."""
    adapter: bool
    """Whether weights that an adapter adds to the layer learn."""

    @property
    def matrices(self) -> tuple[bool, ...]:
        """For each of `MATRIX_NAMES`, whether it learns."""
        return tuple(learns for name, learns in zip(LAYER_NAMES, self.weights, strict=True) if ".linear_" in name)

    @property
    def keeps(self) -> bool:
        """Whether there is a backward pass through this layer."""
        return self.input_gradient or self.adapter or any(self.weights)


@dataclass(frozen=True, slots=True)
class Learning:
    """Which parameters of a model learn; weights of its adapter always do."""

    frozen: frozenset[str]
    """Names of parameters that do not learn."""
    parts: tuple[bool, bool, bool]
    """For each of `PART_NAMES`, whether one of its parameters learns."""
    shares: tuple[float, float, float]
    """For each of `PART_NAMES`, the share of its parameters from the first one that learns on."""
    layers: tuple[LearningLayer, ...]
    """The decoder layers."""
    output: bool
    """Whether the output layer learns."""
    input_gradient_of_output: bool
    """Whether something before the output layer learns."""

    def before_layer(self, layer: int) -> bool:
        """Return whether something before a decoder layer learns, or with `len(layers)`, before the final norm."""
        return self.layers[layer].input_gradient if layer < len(self.layers) else self.layers[-1].keeps

    @property
    def anything(self) -> bool:
        """Whether a parameter of the parts learns."""
        return any(self.parts)


def learning_of(model: ModelConfig, freeze: tuple[str, ...]) -> Learning:
    """Return what learns in a model.

    Args:
        model: its parts and adapter.
        freeze: patterns of parameters that do not learn, as in `training.freeze`.
    """
    adapted = () if model.adapter is None else tuple(model.adapter.parts)
    return _learning(dataclasses.replace(model, adapter=None), adapted, freeze)


@lru_cache(maxsize=64)
def _learning(model: ModelConfig, adapted: tuple[str, ...], freeze: tuple[str, ...]) -> Learning:
    sizes = parameter_sizes(model)
    frozen = frozenset(name for name in sizes if matches_any(freeze, name))
    inside = [{name: size for name, size in sizes.items() if name.startswith(f"{part}.")} for part in PART_NAMES]
    parts = tuple(any(name not in frozen for name in names) for names in inside)
    language = PART_NAMES[-1]
    flows = any(parts[:-1]) or any(part in adapted for part in PART_NAMES[:-1])
    flows |= f"{language}.embedding.word_embeddings.weight" not in frozen
    layers = []
    for number in range(model.language.num_layers):
        weights = tuple(f"{language}.decoder.layers.{number}.{name}" not in frozen for name in LAYER_NAMES)
        layers.append(LearningLayer(weights, flows, language in adapted))
        flows = layers[-1].keeps
    output = "embedding.word_embeddings" if model.language.share_embeddings_and_output_weights else "output_layer"
    return Learning(
        frozen=frozen,
        parts=parts,  # type: ignore[arg-type]
        shares=tuple(_share_from_first(names, frozen) for names in inside),  # type: ignore[arg-type]
        layers=tuple(layers),
        output=f"{language}.{output}.weight" not in frozen,
        input_gradient_of_output=flows or f"{language}.decoder.final_layernorm.weight" not in frozen,
    )


def _share_from_first(sizes: dict[str, int], frozen: frozenset[str]) -> float:
    before = 0
    for name, size in sizes.items():
        if name not in frozen:
            return 1 - before / sum(sizes.values())
        before += size
    return 0.0
