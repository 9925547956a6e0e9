import pytest

from megatron_vlm.config.grid import Grid
from tests.support.projectors import assert_same, build, merged


@pytest.mark.parametrize("order", ["row", "column"])
@pytest.mark.parametrize("patches", [Grid(4, 4), Grid(3, 3), Grid(2, 5)], ids=str)
def test_it_is_one_product_of_merged_patches_and_a_bias(patches, order, one_rank):
    def reference(weights, features):
        return merged(features, patches, order) @ weights["encoder.weight"].T + weights["encoder.bias"]

    assert_same(build("downsample", patches, token_order=order), reference, patches)
