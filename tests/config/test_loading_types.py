"""Sections whose `type:` names a module."""

import pytest
import yaml

from megatron_vlm.config import ConfigError, ModelConfig, config_to_dict, load_config, load_section, save_config
from megatron_vlm.config.projectors import make_projector
from megatron_vlm.config.projectors.linear import Config as LinearConfig
from megatron_vlm.config.projectors.mlp2x_gelu import Config as MLPConfig
from megatron_vlm.config.towers.clip import Config as ClipConfig
from tests.support.configs import tiny_model
from tests.support.toy_parts import toy_parts

__all__ = ["toy_parts"]
SIZES = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}


@pytest.fixture
def load(tmp_path):
    """Load a model with these sections beside its sizes: `load(overrides, projection={...})`; a line for each key."""

    def load_model(*overrides, **sections):
        tree = {"language": {**SIZES, "vocab_size": 100}, "vision": SIZES, **sections}
        (tmp_path / "model.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        return load_config(ModelConfig, tmp_path / "model.yaml", overrides)

    return load_model


def test_sections_without_a_type_are_a_clip_tower_and_a_linear_projection(load):
    model = load()
    assert model.vision == ClipConfig(**SIZES)
    assert model.projection == LinearConfig()
    assert model.adapter is None


def test_type_chooses_the_settings(load):
    assert load(projection={"type": "mlp2x_gelu"}).projection == MLPConfig()
    assert load(vision={"type": "clip", **SIZES}).vision == ClipConfig(**SIZES)
    assert load("projection.type=mlp2x_gelu").projection == MLPConfig()


def test_null_is_a_section_without_settings(load):
    assert load(projection=None).projection == LinearConfig()
    assert load(adapter=None).adapter is None


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"projection": {"type": "mlp3x"}},
            r"unknown projection.type 'mlp3x' \(.*model.yaml:13\); fix: choose one of downsample, linear, mlp2x_gelu, ",
        ),
        (
            {"vision": {"type": "siglib", **SIZES}},
            r"unknown vision.type 'siglib' \(.*model.yaml:8\); fix: choose one of clip, ",
        ),
        ({"projection": {"type": 7}}, r"unknown projection.type '7' \(.*model.yaml:13\)"),
        ({"projection": {"type": "linear.Config"}}, r"unknown projection.type 'linear.Config'"),
        (
            {"adapter": {"type": "lorra"}},
            r"unknown adapter.type 'lorra' \(.*model.yaml:13\); fix: choose one of lora",
        ),
        (
            {"adapter": {"rank": 8}},
            r"missing value adapter.type \(.*model.yaml:12\); fix: set it to one of: lora",
        ),
        ({"projection": "linear"}, r"projection='linear' is not a section \(.*model.yaml:12\)"),
        (
            {"projection": {"type": "mlp2x_gelu", "width": 3}},
            r"unknown key projection.width for type mlp2x_gelu \(.*model.yaml:14\); fix: keys here: type$",
        ),
        (
            {"vision": {**SIZES, "patchsize": 3}},
            r"unknown key vision.patchsize for type clip \(.*model.yaml:12\); fix: did you mean vision.patch_size",
        ),
        ({"vision": {"type": "clip"}}, r"missing value vision.num_layers for type clip \(.*model.yaml:7\)"),
        (
            {"vision": {**SIZES, "image_size": 335}},
            r"image_size=335 is not a multiple of patch_size=14 \(.*model.yaml:7\)",
        ),
    ],
)
def test_wrong_part_is_named_with_its_line(load, sections, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(**sections)
    assert "\n" not in str(error.value)


def test_wrong_type_of_an_override_names_the_override(load):
    with pytest.raises(ConfigError, match=r"unknown projection.type 'mlp3x' \(override projection.type=mlp3x\)"):
        load("projection.type=mlp3x")


def test_a_type_added_from_elsewhere_is_listed_with_the_others(load, toy_parts):
    with pytest.raises(ConfigError, match="choose one of downsample, linear, mlp2x_gelu, .*pixel_shuffle"):
        load(projection={"type": "mlp3x"})
    with pytest.raises(ConfigError, match="missing value adapter.type .* set it to one of: beside_mlp, lora"):
        load(adapter={"rank": 8})
    assert load(adapter={"type": "beside_mlp", "rank": 8}).adapter.rank == 8


def test_saved_model_is_read_back_equal(tmp_path, toy_parts):
    model = tiny_model()
    save_config(model, tmp_path / "model.yaml")
    assert load_config(ModelConfig, tmp_path / "model.yaml") == model
    assert config_to_dict(model)["vision"]["type"] == "clip"


def test_section_of_another_file_is_loaded_alike(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": config_to_dict(tiny_model())}))
    assert load_section(ModelConfig, tmp_path / "run.yaml", "model") == tiny_model()


def test_projection_is_made_by_its_type():
    assert make_projector("mlp2x_gelu") == MLPConfig()
    with pytest.raises(
        ConfigError, match=r"unknown model.projection.type 'mlp3x'; fix: choose one of downsample, linear, "
    ):
        make_projector("mlp3x")
