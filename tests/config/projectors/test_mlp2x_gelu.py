from megatron_vlm.config.grid import Grid
from megatron_vlm.config.operations import Operations
from megatron_vlm.config.projectors.mlp2x_gelu import Config


def test_two_matrices_with_biases_the_second_as_wide_as_the_language_model():
    assert sum(Config().parameter_sizes(3, 5).values()) == 3 * 5 + 5 + 5 * 5 + 5
    assert Config().operations(Grid(2, 4), 3, 5) == Operations(entry=2 * 8 * 3 * 5, inner=2 * 8 * 5 * 5)


def test_every_patch_becomes_a_token():
    assert Config().token_grid(Grid(2, 4)) == Grid(2, 4)
