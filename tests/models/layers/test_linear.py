import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.layers.linear import (
    ColumnLinear,
    ColumnLinearWithoutBias,
    RowLinear,
    local_product,
    without_gradient,
)
from megatron_vlm.training.optimizer import wrap_model
from tests.support.configs import tiny_model, tiny_run
from tests.support.jobs import start

pytestmark = pytest.mark.usefixtures("one_rank")


def layers():
    """Return a column-parallel layer with a bias and a row-parallel one without, of a new model."""
    chunk = build_model(tiny_model(), tiny_run().parallel, Computation())[0]
    return chunk.vision_model.decoder.layers[0].self_attention.linear_qkv, chunk.language_model.decoder.layers[0].mlp


def input_of(layer, rows=5):
    torch.manual_seed(rows)
    return torch.randn(rows, 2, layer.weight.size(1), requires_grad=True)


@pytest.mark.parametrize("index", [0, 1])
def test_the_gradients_are_added_to_the_buffer_of_the_weight(index):
    column, mlp = layers()
    layer = (column, mlp.linear_fc2)[index]
    assert type(layer) is (ColumnLinear, RowLinear)[index]
    before = torch.randn_like(layer.weight)
    layer.weight.main_grad, expected, expected_bias = before.clone(), before.clone(), 0.0
    for rows in (5, 7):  # two micro-batches
        x = input_of(layer, rows)
        out = layer(x)[0]
        out.backward(torch.ones_like(out))
        ones = torch.ones(2 * rows, layer.weight.size(0))
        expected += ones.t() @ x.detach().flatten(0, 1)
        expected_bias += ones.sum(0)
        torch.testing.assert_close(x.grad.flatten(0, 1), ones @ layer.weight.detach())
    torch.testing.assert_close(layer.weight.main_grad, expected)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, expected_bias)
    # megatron-core's hook adds the gradient of a weight without this mark, and wants a gradient with it.
    assert layer.weight.grad_added_to_main_grad
    assert layer.weight.grad is not None


@pytest.mark.parametrize("buffer", [None, torch.float64])
def test_a_weight_without_a_buffer_of_its_dtype_has_its_gradient(buffer):
    layer = layers()[0]
    if buffer is not None:
        layer.weight.main_grad = torch.zeros_like(layer.weight, dtype=buffer)
    x = input_of(layer)
    layer(x)[0].sum().backward()
    ones = torch.ones(10, layer.weight.size(0))
    torch.testing.assert_close(layer.weight.grad, ones.t() @ x.detach().flatten(0, 1))
    assert not hasattr(layer.weight, "grad_added_to_main_grad")


def test_a_frozen_weight_gets_no_gradient_and_keeps_no_input():
    layer = layers()[0].requires_grad_(False)
    layer.weight.main_grad = torch.zeros_like(layer.weight)
    x = input_of(layer)
    out = layer(x)[0]
    assert sum(saved is not None for saved in out.grad_fn.saved_tensors) == 1  # the weight
    out.backward(torch.ones_like(out))
    torch.testing.assert_close(x.grad.flatten(0, 1), torch.ones(10, layer.weight.size(0)) @ layer.weight)
    assert not layer.weight.main_grad.any()


def test_an_input_that_needs_no_gradient_gets_none():
    layer = layers()[0]
    x = input_of(layer).detach()
    layer(x)[0].sum().backward()
    assert x.grad is None
    assert layer.weight.grad is not None


def test_every_linear_weight_of_a_run_is_accumulated_by_its_product():
    state = start(tiny_run())
    linear = [m for m in state.chunks[0].modules() if isinstance(m, (ColumnLinear, RowLinear))]
    # per layer two of attention and two of the MLP, the projection, and the output layer
    assert len(linear) == 4 * (2 + 4) + 2 + 1
    assert isinstance(state.chunks[0].language_model.output_layer, ColumnLinear)


def test_the_output_layer_keeps_its_parameters_and_its_place():
    names = [name for name, _ in build_model(tiny_model(), tiny_run().parallel, Computation())[0].named_parameters()]
    assert "language_model.output_layer.weight" in names
    assert len(names) == len(set(names))


def test_a_weight_that_the_embedding_shares_is_left_to_autograd():
    model = tiny_model(share_embeddings_and_output_weights=True)
    chunks = build_model(model, tiny_run().parallel, Computation())
    assert type(chunks[0].language_model.output_layer) is ColumnParallelLinear
    assert wrap_model(tiny_run(model=model), chunks)


def test_a_layer_without_a_bias_stands_between_layers_with_one():
    column, _ = layers()
    sizes = (column.input_size, column.output_size)
    settings = {"config": column.config, "init_method": torch.nn.init.zeros_, "tp_group": column.tp_group}
    layer = ColumnLinearWithoutBias(*sizes, bias=True, skip_bias_add=False, **settings)
    assert column.bias is not None
    assert layer.bias is None
    output, bias = layer(input_of(layer))
    assert bias is None
    assert not output.any()


def test_a_local_product_takes_no_rows_and_gives_gradients_of_zero():
    weight = torch.randn(5, 3, requires_grad=True)
    x = torch.randn(4, 3)
    assert torch.equal(local_product(x, weight), x @ weight.t())
    local_product(x[:0], weight).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(5, 3))


def test_weights_without_use_get_gradients_of_zero():
    x, learns, rests = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True), torch.ones(2)
    out = without_gradient(x, learns, rests)
    assert torch.equal(out, x)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones(3))
    assert torch.equal(learns.grad, torch.zeros(2))
    assert rests.grad is None


def test_their_gradient_buffer_stays_as_it_is():
    weight = torch.ones(2, requires_grad=True)
    weight.main_grad, weight.grad_added_to_main_grad = torch.full((2,), 7.0), False
    without_gradient(torch.ones(3), weight).sum().backward()
    assert torch.equal(weight.main_grad, torch.full((2,), 7.0))
    assert weight.grad_added_to_main_grad
