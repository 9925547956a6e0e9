import torch

from megatron_vlm.models.layers.gradients import give_zero_gradients, keep_gradient_path


def test_parameters_get_gradients_of_zero_and_the_input_its_own():
    module = torch.nn.Linear(2, 3)
    x = torch.ones(4, requires_grad=True)
    give_zero_gradients(x, module).mul(2).sum().backward()
    assert torch.equal(x.grad, torch.full((4,), 2.0))
    assert torch.equal(module.weight.grad, torch.zeros(3, 2))
    assert torch.equal(module.bias.grad, torch.zeros(3))


def test_frozen_parameters_get_none():
    module = torch.nn.Linear(2, 3)
    module.weight.requires_grad_(False)
    x = torch.ones(4)
    give_zero_gradients(x, module).sum().backward()
    assert module.weight.grad is None
    assert torch.equal(module.bias.grad, torch.zeros(3))


def test_no_gradient_is_asked_for_where_nothing_learns():
    x, frozen = torch.ones(4), torch.nn.Linear(2, 3).requires_grad_(False)
    assert give_zero_gradients(x, frozen) is x
    assert keep_gradient_path(x, frozen) is x


def test_input_of_a_learning_module_carries_a_gradient_even_where_nothing_before_it_learns():
    x, learned = torch.ones(4), torch.ones(4, requires_grad=True)
    assert keep_gradient_path(x, torch.nn.Linear(4, 2)).requires_grad
    assert not x.requires_grad
    assert keep_gradient_path(learned, torch.nn.Linear(4, 2)) is learned
    with torch.no_grad():
        assert not keep_gradient_path(x, torch.nn.Linear(4, 2)).requires_grad
