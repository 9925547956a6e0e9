import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.operations import Operations
from megatron_vlm.config.projectors.downsample import Config


def test_one_matrix_of_four_patches_with_a_bias():
    assert sum(Config().parameter_sizes(3, 5).values()) == 4 * 3 * 5 + 5
    assert Config().operations(Grid(3, 4), 3, 5) == Operations(entry=2 * 4 * 12 * 5)


def test_four_patches_become_a_token():
    assert Config().token_grid(Grid(24, 24)).size == 144  # of 336 pixels, as in Table 7
    assert Config().token_grid(Grid(3, 4)) == Grid(2, 2)


def test_a_class_token_has_no_neighbours():
    with pytest.raises(ConfigError, match="the projection downsample merges neighbouring patches, but the tower also"):
        Config().token_grid(Grid(4, 4, 1))
