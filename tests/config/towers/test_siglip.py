import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.towers.siglip import Config


def test_the_published_image_is_no_multiple_of_its_patches():
    assert Config().constant_grid == Grid(27, 27)


def test_an_image_without_a_patch_is_refused():
    with pytest.raises(ConfigError, match="model.vision.image_size=13 is less than patch_size=14"):
        Config(image_size=13)


def test_parameters_of_siglip_so400m_384():
    # The vision_model of google/siglip-so400m-patch14-384 has 428,225,600 with its last norm and its attention pool:
    # probe, packed projection, output, norm and MLP.
    hidden, ffn = 1152, 4304
    pool = hidden + 4 * hidden * (hidden + 1) + 2 * hidden + 2 * hidden * ffn + ffn + hidden
    assert Config(feature_layer=-1).num_parameters == 428_225_600 - 2 * hidden - pool
