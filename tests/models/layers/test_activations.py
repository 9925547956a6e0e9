import pytest
import torch

from megatron_vlm.models.layers.activations import ACTIVATIONS

HUGGING_FACE = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_that_of_the_published_models(name):
    activations = pytest.importorskip("transformers.activations")
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), activations.ACT2FN[HUGGING_FACE[name]](x), rtol=1e-12, atol=1e-12)


def test_the_three_are_not_the_same():
    x = torch.linspace(-3, 3, 101)
    values = [activation(x) for activation in ACTIVATIONS.values()]
    assert all(not torch.allclose(values[i], values[i - 1], atol=1e-5) for i in range(3))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradient_is_that_of_the_function(name):
    x = torch.linspace(-6, 6, 41, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ACTIVATIONS[name], (x,))
