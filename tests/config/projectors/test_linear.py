from megatron_vlm.config.grid import Grid
from megatron_vlm.config.operations import Operations
from megatron_vlm.config.projectors.linear import Config


def test_one_matrix_with_a_bias_between_the_widths():
    assert sum(Config().parameter_sizes(3, 5).values()) == 3 * 5 + 5
    assert Config().operations(Grid(2, 4), 3, 5) == Operations(entry=2 * 8 * 3 * 5)


def test_every_patch_becomes_a_token():
    assert Config().token_grid(Grid(2, 4)) == Grid(2, 4)
