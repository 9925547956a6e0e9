import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.projectors import make_projector
from megatron_vlm.config.projectors.transformer_block import Config


def test_features_keep_their_number():
    assert Config(hidden_size=8, num_attention_heads=2).token_grid(Grid(2, 3, 1)) == Grid(2, 3, 1)


def test_the_width_of_the_mlp_is_four_times_that_of_the_layers_unless_it_is_set():
    assert Config(hidden_size=8, num_attention_heads=2).ffn_width == 32
    assert Config(hidden_size=8, num_attention_heads=2, ffn_hidden_size=24).ffn_width == 24


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 8, "num_attention_heads": 3}, "model.projection.hidden_size=8 is not a multiple of"),
        (
            {"hidden_size": 8, "num_attention_heads": 2, "num_layers": 0},
            "num_layers=0 is not positive",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(**settings)


def test_its_sizes_have_no_default():
    with pytest.raises(ConfigError, match=r"transformer_block needs hidden_size, num_attention_heads .*fix: set them"):
        make_projector("transformer_block")
