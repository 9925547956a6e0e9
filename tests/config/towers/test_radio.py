import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.towers.radio import Config

HUGE = {"num_layers": 32, "hidden_size": 1280, "ffn_hidden_size": 5120, "num_attention_heads": 16}


def test_an_image_of_432_pixels_has_the_patches_of_siglip():
    tower = Config(**HUGE)
    assert tower.constant_grid == Grid(27, 27)
    assert tower.num_prefix_tokens == 8
    assert tower.num_layers_run == 32


def test_parameters_of_radio_v2_5_h():
    # Layers of ViT-H, patches without bias, 128 x 128 positions, eight tokens; no norm at the end.
    layer = 12 * 1280**2 + 13 * 1280
    assert Config(**HUGE).num_parameters == 32 * layer + (3 * 16**2 + 128**2 + 8) * 1280


def test_the_table_of_positions_does_not_grow_with_the_image():
    assert Config(**HUGE, image_size=768).num_parameters == Config(**HUGE, image_size=224).num_parameters


def test_an_image_larger_than_the_table_is_refused():
    with pytest.raises(ConfigError, match=r"image_size=2064 has 129 patches .* position_grid=128; fix: .* most 2048"):
        Config(**HUGE, image_size=2064)


@pytest.mark.parametrize("summary", [(0, 4), (-1,)])
def test_a_summary_of_other_tokens_is_refused(summary):
    with pytest.raises(ConfigError, match=r"summary_tokens=\[.*\] are not all class tokens; fix: choose from 0 to 3"):
        Config(**HUGE, summary_tokens=summary)


@pytest.mark.parametrize(
    ("name", "what"), [("position_grid", "positive"), ("num_class_tokens", "positive"), ("num_registers", "negative")]
)
def test_a_size_below_its_least_is_refused(name, what):
    with pytest.raises(ConfigError, match=f"model.vision.{name}=-1 is .*{what}"):
        Config(**HUGE, **{name: -1})
