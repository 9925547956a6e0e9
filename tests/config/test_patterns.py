import dataclasses

import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.config.patterns import adapter_names, check_patterns, matches, matches_any, parameter_sizes
from tests.support.configs import tiny_model
from tests.support.toy_parts import toy_parts

__all__ = ["toy_parts"]
LAYER = "language_model.decoder.layers"


def test_a_pattern_names_a_parameter_or_a_module_around_it():
    name = f"{LAYER}.1.mlp.linear_fc1.weight"
    for pattern in (
        name,
        f"{LAYER}.1",
        f"{LAYER}.1.mlp",
        "language_model",
        "*.mlp.*",
        f"{LAYER}.[0-3].*",
        "*fc1.weight",
    ):
        assert matches(pattern, name), pattern
    for pattern in (f"{LAYER}.0", "language", "vision_model", f"{LAYER}.1.mlp.linear", f"{LAYER}.[2-3]"):
        assert not matches(pattern, name), pattern


def test_a_layer_number_is_matched_as_a_whole():
    assert not matches(f"{LAYER}.1", f"{LAYER}.10.mlp.linear_fc1.weight")
    assert not matches(f"{LAYER}.[0-3].*", f"{LAYER}.10.mlp.linear_fc1.weight")
    assert matches(f"{LAYER}.1[0-5]", f"{LAYER}.10.mlp.linear_fc1.weight")


def test_one_of_several_patterns_is_enough():
    assert matches_any(("vision_model", "language_model.*"), "language_model.output_layer.weight")
    assert not matches_any((), "language_model.output_layer.weight")


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_of_a_model_has_its_name_and_size(tied, play, tmp_path):
    from tests.support.configs import tiny_run

    config = tiny_run(str(tmp_path), model=tiny_model(share_embeddings_and_output_weights=tied))
    (chunk,) = play(config, 0, 1, step=False).chunks
    built = {name: parameter.numel() for name, parameter in chunk.named_parameters()}
    assert parameter_sizes(config.model) == built


def test_names_are_in_the_order_of_the_forward_pass():
    names = list(parameter_sizes(tiny_model()))
    order = ["vision_model.conv1", "vision_projection", "language_model.embedding", f"{LAYER}.0", f"{LAYER}.3"]
    places = [next(i for i, name in enumerate(names) if name.startswith(part)) for part in order]
    assert places == sorted(places)
    assert names[-1] == "language_model.output_layer.weight"


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("vision_modle", "did you mean vision_model"),
        (f"{LAYER}.7", rf"did you mean {LAYER}.\d"),
        ("???", "names are like language_model.output_layer.weight"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_by_name(pattern, hint):
    names = parameter_sizes(tiny_model())
    check_patterns("training.freeze", ("vision_model", f"{LAYER}.3"), names)
    with pytest.raises(ConfigError, match=rf"training.freeze: '.*' matches no parameter of the model; fix: {hint}"):
        check_patterns("training.freeze", ("vision_model", pattern), names)


def test_an_adapter_names_what_it_adds(toy_parts):
    from megatron_vlm.config.adapters.beside_mlp import Config  # type: ignore[import-not-found]

    assert adapter_names(tiny_model()) == ()
    model = dataclasses.replace(tiny_model(), adapter=Config(rank=2))
    assert adapter_names(model)[:2] == (f"{LAYER}.0.down.weight", f"{LAYER}.0.up.weight")
    assert len(adapter_names(model)) == 8
