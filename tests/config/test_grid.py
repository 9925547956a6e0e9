import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.config.grid import Grid


def test_features_are_those_of_the_grid_and_those_before_it():
    assert (Grid(2, 3).size, Grid(2, 3, 1).size) == (6, 7)
    assert Grid(2, 3).num_patches == Grid(2, 3, 1).num_patches == 6


def test_a_class_token_is_refused_where_neighbours_are_merged():
    assert Grid(2, 3).only_patches("the projection x") == Grid(2, 3)
    with pytest.raises(ConfigError, match=r"the projection x merges .* \(model.vision.drop_class_token\); fix: set it"):
        Grid(2, 3, 1).only_patches("the projection x")


def test_merged_patches_are_half_as_many_along_each_side_rounded_up():
    assert Grid(4, 7).merged() == Grid(2, 4)
