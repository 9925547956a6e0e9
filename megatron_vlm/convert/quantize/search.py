"""AWQ's searches in one layer: factors that protect inputs with large activations, and bounds that cut off outliers.

Source: AWQ, arXiv:2306.00978, and its code llm-awq. What is minimised is the same. But where the output is linear in a
matrix W, the squared error of a version W' over tokens X is the trace of (W' - W) X^T X (W' - W)^T, so the tokens are
not multiplied with each version, and the search for bounds sees all of them, not 512.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vlm.convert.quantize.decoder_layer import GATE_UP, NORMS, QUERY_KEY_VALUE, DecoderLayer, Weights
from megatron_vlm.convert.quantize.groups import Grid, Quantised, into_groups, quantise, rounded

RATIOS = tuple(step / 20 for step in range(20))
_CUTS = tuple(1 - step / 20 for step in range(10))
_SEQUENCES_AT_ONCE = 8
_ROWS_AT_ONCE = 1024
_READERS = {
    "attention": QUERY_KEY_VALUE,
    "o_proj": ("o_proj",),
    "mlp": GATE_UP,
    "down_proj": ("down_proj",),
}
"""The inputs of a layer's matrices, and the matrices that read them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How weights are quantised."""

    grid: Grid
    group_size: int
    with_scales: bool = True
    """Search for factors of the inputs."""
    with_bounds: bool = True
    """Search for bounds of the weights of a group."""


@dataclass(slots=True)
class _Input:
    """What a text says about the input of a matrix."""

    magnitude: Tensor
    """float[in]: mean of the absolute values."""
    blocks: Tensor
    """float[in / G, G, G]: X^T X of each group."""
    gram: Tensor | None
    """float[in, in]: all of X^T X, where a search needs it."""

    def divided(self, factors: Tensor) -> None:
        """Divide the input by factors."""
        groups = factors.view(self.blocks.shape[0], -1)
        self.blocks = self.blocks / (groups[:, :, None] * groups[:, None, :])


def quantise_layer(
    layer: DecoderLayer, weights: Weights, hidden: Tensor, recipe: Recipe, scale_dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Quantised]]:
    """Quantise a layer, and replace its inputs by its outputs before that: the next layer's inputs.

    Args:
        layer: its arithmetic.
        weights: its matrices and norms, float32, on the device that computes.
        hidden: float32[n, s, h], its inputs for a text; is written to.
        recipe: how.
        scale_dtype: type in which scales are stored.

    Returns:
        The norms, which take the factors of the inputs behind them, and the matrices; by the names of their modules.
    """
    changed = {**weights}
    inputs = _observe(layer, weights, hidden, recipe)
    factors = _search_factors(layer, weights, hidden, inputs, recipe) if recipe.with_scales else {}
    for name, divisors in factors.items():
        fold(changed, name, divisors)
        inputs[name].divided(divisors)
    for batch in hidden.split(_SEQUENCES_AT_ONCE):
        batch.copy_(layer(batch.to(_device(weights)), weights))
    matrices = {}
    for name, readers in _READERS.items():
        for reader in readers:
            # Queries and keys are multiplied with each other: an error of one group says little about the scores.
            if recipe.with_bounds and reader not in ("q_proj", "k_proj"):
                changed[reader] = _bounded(changed[reader], inputs[name].blocks, recipe)
            matrices[reader] = quantise(changed[reader], recipe.group_size, recipe.grid, scale_dtype)
    return {name: changed[name] for name in NORMS}, matrices


def fold(weights: dict[str, Tensor], name: str, factors: Tensor) -> None:
    """Divide an input by factors where it is made, and multiply the matrices that read it: the layer stays the same.

    Args:
        weights: of the layer; entries are replaced.
        name: of the input: "attention" and "mlp" come from a norm, "o_proj" and "down_proj" from a matrix.
        factors: float[in].
    """
    source = {"attention": NORMS[0], "mlp": NORMS[1], "o_proj": "v_proj", "down_proj": "up_proj"}[name]
    weights[source] = weights[source] / (factors if weights[source].ndim == 1 else factors[:, None])
    for reader in _READERS[name]:
        weights[reader] = weights[reader] * factors


def _device(weights: Weights) -> torch.device:
    return weights["o_proj"].device


def _inputs_of(layer: DecoderLayer, weights: Weights, hidden: Tensor) -> dict[str, Tensor]:
    """Return the inputs of all matrices for some sequences."""
    found = {"attention": layer.norm(hidden, weights[NORMS[0]])}
    found["o_proj"] = layer.mix(found["attention"], weights)
    behind = hidden + found["o_proj"] @ weights["o_proj"].T
    found["mlp"] = layer.norm(behind, weights[NORMS[1]])
    found["down_proj"] = layer.gated(found["mlp"], weights)
    return found


def _observe(layer: DecoderLayer, weights: Weights, hidden: Tensor, recipe: Recipe) -> dict[str, _Input]:
    """Run a text through the layer."""
    device, size = _device(weights), recipe.group_size
    whole = {"down_proj", "o_proj"} & set(_searched(weights))
    inputs: dict[str, _Input] = {}
    for name, readers in _READERS.items():
        width = weights[readers[0]].shape[1]
        inputs[name] = _Input(
            magnitude=torch.zeros(width, device=device),
            blocks=torch.zeros(width // size, size, size, device=device),
            gram=torch.zeros(width, width, device=device) if name in whole else None,
        )
    num_tokens = hidden.shape[0] * hidden.shape[1]
    for batch in hidden.split(_SEQUENCES_AT_ONCE):
        for name, x in _inputs_of(layer, weights, batch.to(device)).items():
            x, found = x.flatten(0, 1), inputs[name]
            found.magnitude += x.abs().sum(0) / num_tokens
            groups = into_groups(x, size).transpose(0, 1)
            found.blocks += groups.transpose(1, 2) @ groups
            if found.gram is not None:
                found.gram += x.T @ x
    return inputs


def _searched(weights: Weights) -> list[str]:
    """Return the inputs that get factors; that of `o_proj` only if each comes from one row of `v_proj`."""
    has_own_rows = weights["v_proj"].shape == weights["o_proj"].shape
    return [name for name in _READERS if name != "o_proj" or has_own_rows]


def _search_factors(
    layer: DecoderLayer, weights: Weights, hidden: Tensor, inputs: dict[str, _Input], recipe: Recipe
) -> dict[str, Tensor]:
    """Return the best factors of each input; every search sees the other matrices as they are."""
    errors = {name: torch.zeros(len(RATIOS), dtype=torch.float64) for name in _searched(weights)}
    for index, ratio in enumerate(RATIOS):
        for name, found in inputs.items():
            if found.gram is not None:
                error = _with_factors(weights, name, _factors(found, ratio), recipe)[name] - weights[name]
                errors[name][index] = ((error @ found.gram) * error).sum().double().cpu()
    for batch in hidden.split(_SEQUENCES_AT_ONCE):
        read = _inputs_of(layer, weights, batch.to(_device(weights)))
        for name, compute in (("attention", layer.attention), ("mlp", layer.mlp)):
            candidates = (_with_factors(weights, name, _factors(inputs[name], ratio), recipe) for ratio in RATIOS)
            errors[name] += torch.stack(list(_squared_errors(compute, read[name], weights, candidates)))
    return {name: _factors(inputs[name], RATIOS[int(error.argmin())]) for name, error in errors.items()}


def _squared_errors(
    compute: Callable[[Tensor, Weights], Tensor], x: Tensor, weights: Weights, candidates: Iterator[Weights]
) -> Iterator[Tensor]:
    exact = compute(x, weights)
    for candidate in candidates:
        yield (compute(x, candidate) - exact).square_().sum().double().cpu()


def _factors(found: _Input, ratio: float) -> Tensor:
    """Return magnitudes to the power of a ratio, around 1."""
    factors = (found.magnitude**ratio).clamp(min=1e-4)
    return factors / (factors.max() * factors.min()).sqrt()


def _with_factors(weights: Weights, name: str, factors: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """Return the weights of the layer with the matrices that read an input rounded after a multiplication."""
    changed = {
        reader: rounded(weights[reader] * factors, recipe.group_size, recipe.grid) / factors
        for reader in _READERS[name]
    }
    return {**weights, **changed}


def _bounded(weight: Tensor, blocks: Tensor, recipe: Recipe) -> Tensor:
    """Return a matrix whose groups are cut off where their products with the text are rounded best.

    Args:
        weight: float[out, in].
        blocks: float[in / G, G, G]: X^T X of the input.
        recipe: how it will be rounded.
    """
    return torch.cat([_bounded_rows(rows, blocks, recipe) for rows in weight.split(_ROWS_AT_ONCE)])


def _bounded_rows(weight: Tensor, blocks: Tensor, recipe: Recipe) -> Tensor:
    groups = into_groups(weight, recipe.group_size)
    largest = groups.abs().amax(-1, keepdim=True)
    best = torch.full_like(largest, torch.inf)
    bounds = largest
    for cut in _CUTS:
        bound = cut * largest
        clamped = groups.clamp(-bound, bound).flatten(1)
        error = into_groups(rounded(clamped, recipe.group_size, recipe.grid) - weight, recipe.group_size)
        products = torch.einsum("ogi,gij->ogj", error, blocks)
        squared = (products * error).sum(-1, keepdim=True)
        bounds = torch.where(squared < best, bound, bounds)
        best = torch.minimum(best, squared)
    return groups.clamp(-bounds, bounds).flatten(1)
