"""Compare two models: settings, and names, shapes and values of their tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_vlm.convert.differences import describe_differences, different_settings
from megatron_vlm.convert.opened_weights import OpenedWeights

_VOCABULARY_KEYS = ("model.language_model.embedding.word_embeddings.weight", "model.language_model.output_layer.weight")
_SHOWN = 3
_PART_VALUES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightComparison:
    """What two models have in common."""

    num_tensors: int
    """Compared tensors; each layer counts."""
    num_equal: int
    """Those with equal bits, or, if the types differ, with values that round to those of the coarser type."""
    rounded: bool
    """Whether some were compared after rounding."""
    faults: tuple[str, ...]
    """What differs, a line each; empty if the models are the same."""


def compare_weights(first: OpenedWeights, second: OpenedWeights) -> WeightComparison:
    """Compare the settings, then all tensors, layer by layer.

    Rows of the vocabulary that no token of the tokenizer has are left out.
    """
    shapes = [{key: tensor.shape for key, tensor in one.tensors.items()} for one in (first, second)]
    names = describe_differences(*shapes)
    common = [
        key
        for key, tensor in first.tensors.items()
        if key in second.tensors and second.tensors[key].shape == tensor.shape
    ]
    pairs = [(key, layer) for key in common for layer in first.tensors[key].layers]
    different = []
    for key, layer in tqdm(pairs, "compare", unit="tensor", leave=False, disable=None):
        # Without a name: memory would hold these until the next two are made.
        if difference := _difference(_values(first, key, layer), _values(second, key, layer)):
            different.append(f"{_name(key, layer)} {difference}")
    settings = different_settings(first.model, second.model, only_what_runs=True)
    faults = [f"{key} is {value} and {other}" for key, value, other in settings]
    faults += [names] if names else []
    if different:
        more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        faults.append(f"{len(different)} tensors differ: {'; '.join(different[:_SHOWN])}{more}")
    return WeightComparison(
        num_tensors=len(pairs),
        num_equal=len(pairs) - len(different),
        rounded=any(first.tensors[key].dtype != second.tensors[key].dtype for key in common),
        faults=tuple(faults),
    )


def _values(weights: OpenedWeights, key: str, layer: int | None) -> Tensor:
    tensor = weights.tensors[key].make(layer)
    return tensor[: weights.model.language.vocab_size] if key in _VOCABULARY_KEYS else tensor


def _difference(first: Tensor, second: Tensor) -> str | None:
    """Return by how much two tensors of one shape differ; None if they do not."""
    coarse = min((first.dtype, second.dtype), key=lambda dtype: (dtype.itemsize, -torch.finfo(dtype).eps))
    # A part at a time: the copies of another type are small.
    parts = zip(*(one.reshape(-1).split(_PART_VALUES) for one in (first, second)), strict=True)
    differing = [pair for pair in parts if not _same_bits(*(one.to(coarse) for one in pair))]
    if not differing:
        return None
    largest = torch.tensor([_largest_difference(*(one.to(coarse) for one in pair)) for pair in differing])
    return f"by up to {largest.max().item():.3g}"  # NaN, if there is one


def _largest_difference(first: Tensor, second: Tensor) -> float:
    return (first.double() - second.double()).abs().max().item()


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def _name(key: str, layer: int | None) -> str:
    return key if layer is None else f"{key}[{layer}]"
