import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.towers.dinov2 import Config

SMALL = {"num_layers": 12, "hidden_size": 384, "ffn_hidden_size": 1536, "num_attention_heads": 6}


@pytest.mark.parametrize(("image_size", "side"), [(518, 37), (224, 16)])
def test_the_table_of_positions_stays_whatever_the_image(image_size, side):
    tower = Config(**SMALL, image_size=image_size)
    assert tower.constant_grid == Grid(side, side)
    # Dinov2Model of facebook/dinov2-small has 22,056,960 with the token of masked patches
    assert tower.num_parameters == 22_056_576 - 384


def test_registers_are_no_features():
    assert Config(**SMALL, num_registers=4, drop_class_token=False).constant_grid == Grid(37, 37, 1)


@pytest.mark.parametrize(("name", "message"), [("position_grid", "is not positive"), ("num_registers", "is negative")])
def test_sizes_below_zero_are_refused(name, message):
    with pytest.raises(ConfigError, match=f"model.vision.{name}=-1 {message}"):
        Config(**SMALL, **{name: -1})


def test_parameters_of_dinov2_giant_with_registers():
    giant = {"num_layers": 40, "hidden_size": 1536, "ffn_hidden_size": 4096, "num_attention_heads": 24}
    # Dinov2WithRegistersModel of ViT-g/14 has 1,136,486,912 with the token of masked patches
    tower = Config(**giant, activation="swiglu", num_registers=4)
    assert tower.num_parameters == 1_136_486_912 - 1536
