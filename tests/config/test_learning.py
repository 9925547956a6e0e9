import dataclasses

import pytest

from megatron_vlm.config.learning import learning_of
from tests.support.configs import tiny_model

LAYER = "language_model.decoder.layers"
VISION = ("vision_model", "vision_projection")
BELOW = (*VISION, "language_model.embedding")


def keeps(*freeze, **language):
    return tuple(layer.keeps for layer in learning_of(tiny_model(**language), freeze).layers)


def test_everything_learns_where_nothing_is_frozen():
    learning = learning_of(tiny_model(), ())
    assert learning.parts == (True, True, True)
    assert learning.shares == (1, 1, 1)
    assert learning.frozen == frozenset()
    assert all(layer.weights == (True,) * 6 and layer.input_gradient for layer in learning.layers)
    assert learning.output
    assert learning.input_gradient_of_output


def test_the_gradient_ends_at_the_first_layer_that_learns():
    assert keeps(*BELOW, f"{LAYER}.[0-1]") == (False, False, True, True)
    assert keeps(*BELOW, LAYER) == (False,) * 4


@pytest.mark.parametrize("learns", [*VISION, "language_model.embedding"])
def test_it_goes_through_frozen_layers_to_what_learns_before_them(learns):
    assert keeps(*(part for part in BELOW if part != learns), LAYER) == (True,) * 4


def test_matrices_of_a_layer_learn_one_by_one():
    layer = learning_of(tiny_model(), (f"{LAYER}.1.mlp", "*.input_layernorm")).layers[1]
    assert layer.weights == (False, True, True, True, False, False)
    assert layer.matrices == (True, True, False, False)


def test_a_tied_output_layer_learns_as_the_embedding_does():
    tied = tiny_model(share_embeddings_and_output_weights=True)
    assert not learning_of(tied, ("language_model.embedding",)).output
    assert learning_of(tied, ("language_model.decoder",)).output
    assert not learning_of(tiny_model(), ("language_model.output_layer",)).output


def test_nothing_reaches_the_output_layer_where_nothing_before_it_learns():
    learning = learning_of(tiny_model(), (*BELOW, "language_model.decoder"))
    assert learning.output
    assert not learning.input_gradient_of_output


def test_a_part_counts_from_its_first_parameter_that_learns():
    learning = learning_of(tiny_model(), ("vision_model.decoder.layers.0", "vision_model.[!d]*"))
    assert learning.parts[0]
    assert 0 < learning.shares[0] < 0.6
    assert learning_of(tiny_model(), ("vision_model",)).shares[0] == 0


@dataclasses.dataclass(frozen=True)
class Adapter:
    parts: tuple[str, ...]


@pytest.mark.parametrize("part", ["vision_model", "language_model"])
def test_the_gradient_reaches_the_weights_of_an_adapter(part):
    model = dataclasses.replace(tiny_model(), adapter=Adapter((part,)))
    learning = learning_of(model, (*VISION, "language_model"))
    assert all(layer.keeps for layer in learning.layers)
    assert learning.layers[0].input_gradient == (part == "vision_model")
    assert not learning.anything
