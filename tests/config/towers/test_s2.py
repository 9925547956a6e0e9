import dataclasses

import pytest
import yaml

from megatron_vlm.config import ConfigError, ModelConfig, config_to_dict, load_section
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.towers.clip import Config as ClipConfig
from megatron_vlm.config.towers.s2 import Config
from tests.support.configs import tiny_model

CLIP = ClipConfig(num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16)


def test_features_are_those_of_the_smallest_scale_with_the_channels_of_all():
    tower = Config(scales=(336, 672, 1008), tower=CLIP)
    assert tower.image_size == 1008
    assert tower.feature_size == 3072
    assert tower.tiles_per_side == (1, 2, 3)
    assert tower.num_tiles == 14
    assert tower.constant_grid == tower.patch_grid(640, 480) == Grid(24, 24)


def test_a_smallest_scale_of_several_tiles_gives_their_features():
    assert Config(scales=(672, 1344), tower=CLIP).constant_grid == Grid(48, 48)


def test_weights_colours_and_scale_of_the_weights_are_those_of_the_tower():
    tower = Config(scales=(336, 672), tower=CLIP)
    for name in ("image_mean", "image_std", "init_method_std"):
        assert getattr(tower, name) == getattr(CLIP, name)
    assert sum(tower.parameter_sizes.values()) == CLIP.num_parameters


def test_every_tile_costs_what_an_image_of_the_tower_costs():
    tower, grid = Config(scales=(336, 672), tower=CLIP), CLIP.constant_grid
    assert tower.operations(grid) == CLIP.operations(grid).times(5)
    kept = tower.activations(grid, learns=True, recompute=False).kept
    assert kept == 5 * CLIP.activations(grid, learns=True, recompute=False).kept


@pytest.mark.parametrize("scales", [(), (672, 336), (336, 336), (0, 336), (-336, 336)])
def test_scales_that_do_not_rise_are_refused(scales):
    with pytest.raises(ConfigError, match=r"model.vision.scales=\[.*\] is not a rising list of sizes"):
        Config(scales=scales, tower=CLIP)


@pytest.mark.parametrize("scales", [(224, 448), (336, 500), (672, 1008)])
def test_scales_that_are_not_whole_tiles_are_refused(scales):
    with pytest.raises(ConfigError, match=r"does not fit tiles of tower.image_size=336 .* e.g. \[336, 672\]"):
        Config(scales=scales, tower=CLIP)


def test_the_inner_tower_is_chosen_by_its_type_and_read_back(tmp_path):
    model = tiny_model()
    model = dataclasses.replace(model, vision=Config(scales=(32, 64), tower=model.vision))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": config_to_dict(model)}))
    assert load_section(ModelConfig, tmp_path / "config.yaml", "model") == model


def test_a_wrong_setting_of_the_inner_tower_is_named(tmp_path):
    model = config_to_dict(tiny_model())
    model["vision"] = {"type": "s2", "scales": [32], "tower": {**model["vision"], "patchsize": 8}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    with pytest.raises(ConfigError, match=r"unknown key model.vision.tower.patchsize for type clip"):
        load_section(ModelConfig, tmp_path / "config.yaml", "model")
