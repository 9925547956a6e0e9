from dataclasses import replace

import pytest
import torch

from megatron_vlm.config.projectors import make_projector
from megatron_vlm.convert.compare_weights import compare_weights
from megatron_vlm.convert.opened_weights import open_weights


@pytest.fixture
def weights(make_run, model_config):
    return open_weights(make_run(model_config))


def edited(weights, key, edit):
    """Return weights whose tensor `key` is another one."""
    tensor = weights.tensors[key]
    other = replace(tensor, make=lambda layer: edit(tensor.make(layer).clone()))
    return replace(weights, tensors={**weights.tensors, key: other})


def test_equal_weights_have_equal_bits(weights):
    found = compare_weights(weights, weights)
    assert (found.num_equal, found.rounded, found.faults) == (found.num_tensors, False, ())
    assert found.num_tensors > len(weights.tensors)  # each layer counts


@pytest.mark.parametrize("value", [0.25, float("nan")])
def test_one_other_value_in_every_layer_is_found(weights, value):
    key = next(key for key in weights.tensors if key.endswith("linear_fc2.weight"))

    def edit(tensor):
        tensor[0, 0] = value
        return tensor

    found = compare_weights(weights, edited(weights, key, edit))
    assert found.num_tensors - found.num_equal == len(weights.tensors[key].layers)
    assert key in found.faults[0]


def test_settings_that_no_tensor_shows_are_compared(weights):
    model = weights.model
    other = replace(model, language=replace(model.language, rotary_base=2 * model.language.rotary_base))
    assert compare_weights(weights, replace(weights, model=other)).faults == (
        f"model.language.rotary_base is {model.language.rotary_base} and {other.language.rotary_base}",
    )


def test_the_sign_of_zero_is_a_bit(weights):
    key = next(key for key in weights.tensors if key.endswith("bias"))
    zeros, signed = (edited(weights, key, lambda tensor, sign=sign: tensor.zero_() * sign) for sign in (1.0, -1.0))
    assert compare_weights(zeros, signed).faults


def test_rows_that_no_token_of_the_tokenizer_has_do_not_count(weights):
    key, language = "model.language_model.embedding.word_embeddings.weight", weights.model.language

    def edit(row):
        def change(tensor):
            tensor[row] += 1
            return tensor

        return change

    assert not compare_weights(weights, edited(weights, key, edit(slice(language.vocab_size, None)))).faults
    assert compare_weights(weights, edited(weights, key, edit(language.vocab_size - 1))).faults


def test_other_shapes_are_found_and_named(weights, make_run, model_config):
    other = open_weights(make_run(replace(model_config, projection=make_projector("linear"))))
    found = compare_weights(weights, other)
    assert "vision_projection" in found.faults[0]


def test_a_coarser_type_is_compared_after_rounding(weights):
    rounded = replace(
        weights,
        tensors={
            key: replace(tensor, dtype=torch.bfloat16, make=lambda layer, make=tensor.make: make(layer).bfloat16())
            for key, tensor in weights.tensors.items()
        },
    )
    found = compare_weights(weights, rounded)
    assert (found.num_equal, found.rounded, found.faults) == (found.num_tensors, True, ())
