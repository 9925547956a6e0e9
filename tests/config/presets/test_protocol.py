"""A preset is a file; a section that names it takes its settings, and its other keys win."""

import importlib
from dataclasses import dataclass

import pytest
import yaml

from megatron_vlm.config import (
    ConfigError,
    LanguageConfig,
    ModelConfig,
    config_to_dict,
    load_config,
    load_section,
    save_config,
)
from megatron_vlm.config.presets import preset_names
from megatron_vlm.config.towers import Tower
from megatron_vlm.config.towers.clip import Config as ClipConfig

PACKAGES = {part: f"megatron_vlm.config.presets.{part}" for part in ("models", "language", "vision")}
SMALL = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The sections of a run that have presets."""

    model: ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Vision:
    vision: Tower


@pytest.fixture(autouse=True)
def toys(tmp_path, monkeypatch):
    """Presets in folders outside of the package, as a user may have them."""
    write = {
        "language": {
            "toy": {"vocab_size": 100, **SMALL},
            "wide-toy": {"preset": "toy", "hidden_size": 64},
            "egg": {"preset": "hen"},
            "hen": {"preset": "egg"},
        },
        "vision": {"toy": {"type": "clip", "image_size": 28, **SMALL}, "other": {"type": "other", **SMALL}},
        "models": {
            "toy": {
                "language": {"preset": "toy", "rotary_base": 500.0},
                "vision": {"preset": "toy", "feature_layer": -1},
                "projection": {"type": "mlp2x_gelu"},
            },
            "typed-below": {"vision": {"preset": "other"}, "language": {"preset": "toy"}},
            "typed": {"preset": "typed-below", "vision": {"type": "clip", "image_size": 42, **SMALL}},
        },
    }
    for part, presets in write.items():
        folder = tmp_path / "presets" / part
        folder.mkdir(parents=True)
        for name, settings in presets.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        package = importlib.import_module(PACKAGES[part])
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])


@pytest.fixture
def load(tmp_path):
    """Load a run from YAML text: `load(text, *overrides)`; the file is run.yaml."""

    def load_text(text, *overrides):
        (tmp_path / "run.yaml").write_text(text)
        return load_config(Run, tmp_path / "run.yaml", overrides).model

    return load_text


def test_preset_of_a_whole_model_names_presets_of_its_parts(load):
    model = load("model: {preset: toy}\n")
    assert model.language == LanguageConfig(vocab_size=100, rotary_base=500.0, **SMALL)
    assert (model.vision.image_size, model.vision.feature_layer, model.projection.type) == (28, -1, "mlp2x_gelu")


def test_preset_may_build_on_another_one(load):
    text = "model:\n  language: {preset: wide-toy}\n  vision: {preset: toy}\n"
    assert load(text).language == LanguageConfig(vocab_size=100, **{**SMALL, "hidden_size": 64})


def test_every_key_beside_the_name_goes_before_the_preset(load):
    model = load("model:\n  preset: toy\n  language: {num_layers: 3}\n  vision: {image_size: 42}\n  backend: torch\n")
    assert (model.language.num_layers, model.language.rotary_base, model.language.vocab_size) == (3, 500.0, 100)
    assert (model.vision.image_size, model.vision.hidden_size, model.backend) == (42, 32, "torch")


def test_part_may_name_another_preset_than_the_whole_does(load):
    model = load("model: {preset: toy, language: {preset: wide-toy}}\n")
    assert (model.language.hidden_size, model.language.rotary_base) == (64, 500.0)


def test_overrides_go_before_the_preset_and_may_name_one(load):
    text = "model: {preset: toy}\n"
    assert load(text, "model.language.num_layers=1", "model.vision.image_size=56").language.num_layers == 1
    assert load(text, "model.language.preset=wide-toy").language.hidden_size == 64
    assert load("{}\n", "model.preset=toy") == load(text)


def test_file_goes_before_the_preset_of_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {preset: toy, language: {num_layers: 3}}\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\nmodel: {language: {preset: wide-toy, vocab_size: 200}}\n")
    language = load_config(Run, tmp_path / "top.yaml").model.language
    assert (language.num_layers, language.hidden_size, language.vocab_size) == (3, 64, 200)


def test_section_of_another_type_takes_nothing_from_the_preset(load):
    model = load("model: {preset: typed, language: {preset: toy}}\n")
    assert config_to_dict(model.vision) == config_to_dict(ClipConfig(image_size=42, **SMALL))
    assert config_to_dict(load("model: {preset: toy, projection: {type: linear}}\n").projection) == {"type": "linear"}


def test_preset_takes_nothing_from_a_section_below_it_that_has_a_type(load):
    model = load("model: {preset: typed, vision: {preset: toy}}\n")
    assert (model.vision.image_size, model.vision.feature_layer) == (28, -2)


@pytest.mark.parametrize("override", [[], ["model.vision.preset=other"]])
def test_preset_beside_another_type_is_refused_unless_it_is_null(override, load):
    where = "override model" if override else "run.yaml:2"
    text = "model: {language: {preset: toy}, vision: {type: clip, num_layers: 2,\n preset: other}}\n"
    message = rf"model.vision.preset other is of type other, the section of type clip \(.*{where}.*vision.preset: null"
    with pytest.raises(ConfigError, match=message):
        load(text, *override)
    with pytest.raises(ConfigError, match="missing value model.vision.hidden_size for type clip"):
        load(text, "model.vision.preset=null")


def test_section_alone_takes_its_preset(tmp_path):
    (tmp_path / "run.yaml").write_text("model: {preset: toy}\n")
    assert load_section(ModelConfig, tmp_path / "run.yaml", "model").language.vocab_size == 100


def test_saved_config_has_the_settings_and_no_name(load, tmp_path):
    model = load("model: {preset: toy}\n")
    save_config(Run(model=model), tmp_path / "saved.yaml")
    assert "preset" not in (tmp_path / "saved.yaml").read_text()
    assert load_config(Run, tmp_path / "saved.yaml").model == model


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  preset: tyo\n", r"unknown model.preset 'tyo' \(.*run.yaml:2\); fix: choose one of .*\btoy\b"),
        ("model:\n  preset: 7\n", r"unknown model.preset 7 \(.*run.yaml:2\)"),
        (
            "model:\n  language:\n    preset: none\n  vision: {preset: toy}\n",
            r"unknown model.language.preset 'none' \(.*run.yaml:3\); fix: choose one of .*llama2-7b.*wide-toy",
        ),
        ("model: {preset: toy}\nmodell: 1\n", r"unknown key modell \(.*run.yaml:2\)"),
        ("model:\n  preset: toy\n  language:\n    layers: 3\n", r"unknown key model.language.layers \(.*run.yaml:4\)"),
        (
            "model:\n  preset: toy\n  language:\n    hidden_size: 30\n",
            r"hidden_size=30 is not a multiple of num_attention_heads=4 \(.*run.yaml:3\)",
        ),
        (
            "model:\n  language: {preset: toy}\n  vision: {preset: toy}\n  projection:\n    preset: toy\n",
            r"unknown key model.projection.preset for type linear \(.*run.yaml:5\)",
        ),
        (
            "model:\n  vision: {preset: toy}\n  language:\n    preset: egg\n",
            r"the presets egg, hen build on each other \(.*run.yaml:4\)",
        ),
    ],
)
def test_mistakes_name_the_place_in_the_file_of_the_user(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text)


def test_unknown_preset_of_an_override_names_the_override(load):
    with pytest.raises(ConfigError, match=r"unknown model.preset 'x' \(override model.preset=x\)"):
        load("model: {preset: toy}\n", "model.preset=x")


def names(part):
    return preset_names(PACKAGES[part])


@pytest.mark.parametrize("name", names("models"))
def test_every_preset_of_a_whole_model_loads(name, load):
    assert load(f"model: {{preset: {name}}}\n").constant_image_tokens


@pytest.mark.parametrize("name", names("language"))
def test_every_preset_of_a_decoder_loads(name, load):
    assert load(f"model: {{language: {{preset: {name}}}, vision: {{preset: toy}}}}\n").language.vocab_size


@pytest.mark.parametrize("name", names("vision"))
def test_every_preset_of_a_tower_loads(name, tmp_path):
    (tmp_path / "run.yaml").write_text(f"vision: {{preset: {name}}}\n")
    assert load_config(Vision, tmp_path / "run.yaml").vision.image_size
