from dataclasses import replace

import pytest
import torch

from megatron_vlm.convert.families import llama
from megatron_vlm.convert.quantize.decoder_layer import LINEARS, NORMS, DecoderLayer
from megatron_vlm.convert.quantize.groups import Grid
from megatron_vlm.convert.quantize.search import Recipe, fold, quantise_layer

GROUP = 32


def layer_weights(language, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights of a layer; a few inputs of each norm are ten times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for rule in llama.rules(language):
        if rule.num_layers is not None:
            for name, shape in zip(rule.names, rule.their_shapes(), strict=True):
                weights[name.split(".")[-2]] = 0.12 * torch.randn(shape, generator=generator)
    for name in NORMS:
        weights[name] += 1
        weights[name][::16] *= 10
        for reader in LINEARS[:3] if name == NORMS[0] else LINEARS[4:6]:
            weights[reader][:, ::16] /= 10
    return weights


def hidden_states(language, seed: int = 1) -> torch.Tensor:
    return torch.randn(9, 16, language.hidden_size, generator=torch.Generator().manual_seed(seed))


def error(language, weights, recipe: Recipe) -> float:
    """Return the squared error of the output of a layer after its quantisation, relative to what the layer adds."""
    layer, hidden = DecoderLayer(language), hidden_states(language)
    norms, matrices = quantise_layer(layer, weights, hidden_states(language), recipe, torch.float16)
    exact = layer(hidden, weights)
    found = layer(hidden, {**norms, **{name: matrix.dequantise() for name, matrix in matrices.items()}})
    return ((found - exact).square().sum() / (exact - hidden).square().sum()).item()


@pytest.mark.parametrize("groups", [2, 4], ids=["grouped queries", "a key for each query"])
def test_factors_change_nothing_before_rounding(groups, model_config):
    language = replace(model_config.language, num_query_groups=groups)
    weights, layer, hidden = layer_weights(language), DecoderLayer(language), hidden_states(language)
    changed, generator = {**weights}, torch.Generator().manual_seed(3)
    for name, source in (("attention", "input_layernorm"), ("mlp", "input_layernorm"), ("down_proj", "up_proj")):
        fold(changed, name, torch.rand(weights[source].shape[0], generator=generator) + 0.1)
    if groups == 4:
        fold(changed, "o_proj", torch.rand(64, generator=generator) + 0.1)
    exact = layer(hidden, weights)
    assert all(not torch.equal(changed[name], weights[name]) for name in ("q_proj", "up_proj", *NORMS))
    assert (layer(hidden, changed) - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("groups", [2, 4], ids=["grouped queries", "a key for each query"])
@pytest.mark.parametrize("grid", [Grid(is_symmetric=False), Grid(is_symmetric=True)], ids=["asymmetric", "symmetric"])
def test_with_outliers_the_searches_lose_less_than_rounding_to_nearest(grid, groups, model_config):
    language = replace(model_config.language, num_query_groups=groups)
    weights, recipe = layer_weights(language), Recipe(grid=grid, group_size=GROUP)
    nearest = error(language, weights, replace(recipe, with_scales=False, with_bounds=False))
    scaled = error(language, weights, replace(recipe, with_bounds=False))
    both = error(language, weights, recipe)
    assert scaled < 0.7 * nearest
    # Normally distributed weights are hardly cut off; errors of the groups are minimised, not that of their sum.
    assert both < 1.02 * scaled


def test_where_single_weights_are_large_their_groups_are_cut_off(model_config):
    weights = layer_weights(model_config.language)
    for name in LINEARS:
        weights[name] = weights[name] * (1 + 40 * weights[name].square())
    recipe = Recipe(grid=Grid(is_symmetric=False), group_size=GROUP, with_scales=False)
    nearest = error(model_config.language, weights, replace(recipe, with_bounds=False))
    assert error(model_config.language, weights, recipe) < 0.97 * nearest


def test_the_next_layer_gets_the_outputs_of_the_exact_one(model_config):
    language = model_config.language
    weights, hidden, layer = layer_weights(language), hidden_states(language), DecoderLayer(language)
    wanted = layer(hidden, weights)
    quantise_layer(layer, weights, hidden, Recipe(grid=Grid(is_symmetric=False), group_size=GROUP), torch.float16)
    assert torch.allclose(hidden, wanted, atol=1e-5)  # batches of other sizes: another order of additions
