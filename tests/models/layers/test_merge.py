import pytest
import torch

from megatron_vlm.config.grid import Grid
from megatron_vlm.models.layers.merge import merge_patches


@pytest.mark.parametrize(
    ("order", "first_patches"),
    # As published: VILA-1.5 goes down the columns, NVILA along the rows.
    [("row", [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])]
    + [("column", [[0, 1, 4, 5], [8, 9, 12, 13], [2, 3, 6, 7], [10, 11, 14, 15]])],
)
def test_four_neighbours_make_a_token(order, first_patches):
    features = torch.arange(16.0).view(1, 16, 1)
    assert merge_patches(features, Grid(4, 4), order)[0].tolist() == first_patches


def test_an_odd_grid_is_padded_below_and_to_the_right():
    merged = merge_patches(torch.arange(1.0, 7.0).view(1, 6, 1), Grid(2, 3), "row")
    assert merged[0].tolist() == [[1, 2, 4, 5], [3, 0, 6, 0]]
    merged = merge_patches(torch.arange(1.0, 10.0).view(1, 9, 1), Grid(3, 3), "column")
    assert merged[0].tolist() == [[1, 2, 4, 5], [7, 8, 0, 0], [3, 0, 6, 0], [9, 0, 0, 0]]
