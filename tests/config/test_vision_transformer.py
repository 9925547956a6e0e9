import pytest
import torch

from megatron_vlm.config import ConfigError
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.modules import find_module, module_names
from megatron_vlm.config.towers.clip import Config
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.layers.replicas import replica_groups
from tests.support.configs import tiny_model_with_tower

EMBEDDINGS = ("class_token", "registers", "position_embeddings.weight")
VISION = {"num_layers": 24, "hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 16}


@pytest.mark.parametrize(("image_size", "side"), [(336, 24), (224, 16)])
def test_every_image_has_the_patches_of_the_square(image_size, side):
    tower = Config(**VISION, image_size=image_size)
    assert tower.constant_grid == Grid(side, side)
    assert {tower.patch_grid(*size) for size in ((1, 1), (640, 480), (480, 640))} == {Grid(side, side)}


@pytest.mark.parametrize(("feature_layer", "layers_run"), [(-1, 24), (-2, 23), (-24, 1)])
def test_layers_after_the_feature_layer_do_not_run(feature_layer, layers_run):
    assert Config(**VISION, feature_layer=feature_layer).num_layers_run == layers_run


@pytest.mark.parametrize("feature_layer", [0, 1, -25])
def test_feature_layer_outside_the_tower_is_refused(feature_layer):
    with pytest.raises(ConfigError, match=f"feature_layer={feature_layer} is not a layer of 24"):
        Config(**VISION, feature_layer=feature_layer)


def test_image_that_does_not_divide_into_patches_is_refused():
    with pytest.raises(ConfigError, match=r"image_size=335 is not a multiple of patch_size=14"):
        Config(**VISION, image_size=335)


def test_tower_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"model.vision.hidden_size=1024 is not a multiple of num_attention_heads=7"):
        Config(**{**VISION, "num_attention_heads": 7})


def test_colours_without_a_spread_are_refused():
    with pytest.raises(ConfigError, match=r"model.vision.image_std=\[0.2, 0.0, 0.2\] is not positive for every colour"):
        Config(**VISION, image_std=(0.2, 0.0, 0.2))


def test_spread_of_the_tower_s_initial_weights_that_is_negative_is_refused():
    with pytest.raises(ConfigError, match="model.vision.init_method_std=-0.1 is negative"):
        Config(**VISION, init_method_std=-0.1)


@pytest.mark.parametrize("name", ["patch_size", "num_layers", "num_attention_heads", "layernorm_epsilon"])
def test_size_of_the_tower_that_is_not_positive_is_refused(name):
    with pytest.raises(ConfigError, match=f"model.vision.{name}=-1 is not positive"):
        Config(**{**VISION, name: -1})


def test_a_kept_class_token_is_one_more_feature():
    kept, dropped = (Config(**VISION, drop_class_token=drop) for drop in (False, True))
    assert kept.constant_grid == Grid(24, 24, 1)
    assert kept.num_parameters == dropped.num_parameters
    assert kept.operations(kept.constant_grid) == dropped.operations(dropped.constant_grid)


def test_attention_grows_with_the_square_of_the_tokens_and_products_with_weights_do_not():
    tower = Config(**VISION)
    small, large = tower.operations(Grid(1, 9)), tower.operations(Grid(1, 19))  # and the class token
    assert large.inner == 2 * small.inner
    assert large.attention == 4 * small.attention
    assert large.entry / small.entry == 19 / 9


@pytest.mark.parametrize("name", module_names("megatron_vlm.models.towers"))
def test_every_parameter_of_a_tower_has_its_name_and_size(name, one_rank):
    tower = tiny_model_with_tower(name).vision
    with torch.device("meta"):
        built = find_module("megatron_vlm.models.towers", name, "tower").build(tower, Computation(), replica_groups())
    assert tower.parameter_sizes == {key: parameter.numel() for key, parameter in built.named_parameters()}
    assert set(tower.no_weight_decay) == {key for key in tower.parameter_sizes if key.endswith(EMBEDDINGS)}
