"""Every preset has the number of parameters of the published model: it is built, without values."""

from dataclasses import replace

import pytest
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_vlm.config import ModelConfig, ParallelConfig, load_section
from megatron_vlm.config.presets import preset_names
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.parallel.groups import build_groups, single_process

PACKAGE = "megatron_vlm.config.presets"
LANGUAGE = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "vicuna-1.5-7b": 6_738_415_616,
    "vicuna-1.5-13b": 13_015_864_320,
    "sheared-llama-2.7b": 2_701_560_320,
    "llama3-8b": 8_030_261_248,
    "yi-34b": 34_388_917_248,
    "smollm2-135m": 134_515_008,
    "tiny": 8_930_432,
}
# Of the whole published encoder, and those among them that no feature of ours passes through.
LAST_NORM, HEAD, MASK_TOKEN = 2, 15_238_352, 1
VISION = {
    "clip-l14-224": (303_179_776, LAST_NORM * 1024),
    "clip-l14-336": (303_507_456, LAST_NORM * 1024),
    "siglip-so400m-384": (428_225_600, LAST_NORM * 1152 + HEAD),
    "internvit-6b-448": (5_536_496_000, 0),
    "internvit-300m-448": (304_012_288, 0),
    "dinov2-s": (22_056_576, MASK_TOKEN * 384),
    "dinov2-b": (86_580_480, MASK_TOKEN * 768),
    "dinov2-l": (304_368_640, MASK_TOKEN * 1024),
    "radio-h": (651_642_880, 0),
}
# Decoder, tower up to its feature layer, and the parameters of the projection.
MODELS = {
    "vila-2.7b": ("sheared-llama-2.7b", "clip-l14-336", 9_180_160),
    "vila-7b": ("llama2-7b", "clip-l14-336", 20_979_712),
    "vila-13b": ("llama2-13b", "clip-l14-336", 31_467_520),
    "vila1.5-3b": ("sheared-llama-2.7b", "siglip-so400m-384", 18_364_416),
    "vila1.5-3b-s2": ("sheared-llama-2.7b", "siglip-so400m-384", 30_170_112),
    "llama3-vila1.5-8b": ("llama3-8b", "siglip-so400m-384", 35_668_992),
    "vila1.5-13b": ("vicuna-1.5-13b", "siglip-so400m-384", 49_826_816),
    "vila1.5-40b": ("yi-34b", "internvit-6b-448", 143_170_560),
}
TOKENS = {"vila-2.7b": 576, "vila-7b": 576, "vila-13b": 576, "vila1.5-40b": 256}
"""Tokens of an image; 196 for the others."""


def load(tmp_path, **model) -> ModelConfig:
    """Return the model of a file with this section `model`."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": model}))
    return load_section(ModelConfig, tmp_path / "run.yaml", "model")


def count(model: ModelConfig) -> dict[str, int]:
    """Return the parameters of each part of a model, less the rows that pad its vocabulary."""
    parallel = ParallelConfig()
    with single_process():
        build_groups(parallel)
        with FakeTensorMode(allow_non_fake_inputs=True):  # no values, and no memory for them
            (chunk,) = build_model(replace(model, backend="torch"), parallel, Computation())
        language = model.language
        padding = (language.padded_vocab_size - language.vocab_size) * language.hidden_size
        matrices = 1 if language.share_embeddings_and_output_weights else 2
        parts = {name: sum(p.numel() for p in part.parameters()) for name, part in chunk.named_children()}
        return {**parts, "language_model": parts["language_model"] - matrices * padding}


@pytest.mark.parametrize(("part", "known"), [("language", LANGUAGE), ("vision", VISION), ("models", MODELS)])
def test_every_preset_has_a_published_number(part, known):
    assert preset_names(f"{PACKAGE}.{part}") == tuple(sorted(known))


@pytest.mark.parametrize("name", LANGUAGE)
def test_decoder_has_the_published_parameters(name, tmp_path):
    model = load(tmp_path, language={"preset": name}, vision={"preset": "clip-l14-224"})
    assert count(model)["language_model"] == LANGUAGE[name]


@pytest.mark.parametrize("name", VISION)
def test_tower_has_the_published_parameters(name, tmp_path):
    model = load(tmp_path, language={"preset": "tiny"}, vision={"preset": name, "feature_layer": -1})
    published, unused = VISION[name]
    assert count(model)["vision_model"] == model.vision.num_parameters == published - unused


@pytest.mark.parametrize("name", MODELS)
def test_whole_model_is_its_published_parts(name, tmp_path):
    model = load(tmp_path, preset=name)
    language, vision, projection = MODELS[name]
    tower = load(tmp_path, language={"preset": "tiny"}, vision={"preset": vision}).vision
    assert model.constant_image_tokens == TOKENS.get(name, 196)
    assert count(model) == {
        "vision_model": tower.num_parameters,
        "vision_projection": projection,
        "language_model": LANGUAGE[language],
    }
