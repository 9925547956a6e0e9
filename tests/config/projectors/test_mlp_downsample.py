import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.projectors.mlp_downsample import Config


@pytest.mark.parametrize(
    ("width", "hidden_size", "millions"),
    # Source: the published projections of VILA1.5-3b, 3b-s2, Llama-3-VILA1.5-8B, 13b and 40b.
    [(1152, 2560, 18.36), (2304, 2560, 30.2), (1152, 4096, 35.66), (1152, 5120, 49.8), (3200, 7168, 143)],
)
def test_parameters_are_those_of_the_published_models(width, hidden_size, millions):
    assert sum(Config().parameter_sizes(width, hidden_size).values()) / 1e6 == pytest.approx(millions, rel=3e-3)


def test_four_patches_become_a_token():
    assert [Config().token_grid(Grid(side, side)).size for side in (24, 27, 32)] == [144, 196, 256]


def test_a_class_token_has_no_neighbours():
    with pytest.raises(ConfigError, match="mlp_downsample merges .* class token .*fix: set it to true"):
        Config().token_grid(Grid(4, 4, 1))
