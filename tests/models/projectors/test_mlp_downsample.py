import math

import pytest
import torch

from megatron_vlm.config.grid import Grid
from tests.support.projectors import assert_same, build, merged


@pytest.mark.parametrize("order", ["row", "column"])
@pytest.mark.parametrize("patches", [Grid(4, 4), Grid(3, 3), Grid(5, 2)], ids=str)
def test_it_is_a_norm_and_two_products_of_merged_patches_with_the_exact_gelu_between(patches, order, one_rank):
    def reference(weights, features):
        x = merged(features, patches, order)  # zeros outside the grid take part in the norm
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        x = x * weights["norm.weight"] + weights["norm.bias"]
        x = x @ weights["mlp.encoder.linear_fc1.weight"].T + weights["mlp.encoder.linear_fc1.bias"]
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return x @ weights["mlp.encoder.linear_fc2.weight"].T + weights["mlp.encoder.linear_fc2.bias"]

    assert_same(build("mlp_downsample", patches, token_order=order), reference, patches)
