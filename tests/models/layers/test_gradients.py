import torch

from megatron_vlm.models.layers.gradients import keep_gradient_path


def test_no_gradient_is_asked_for_where_nothing_learns():
    x, frozen = torch.ones(4), torch.nn.Linear(2, 3).requires_grad_(False)
    assert keep_gradient_path(x, frozen) is x


def test_input_of_a_learning_module_carries_a_gradient_even_where_nothing_before_it_learns():
    x, learned = torch.ones(4), torch.ones(4, requires_grad=True)
    assert keep_gradient_path(x, torch.nn.Linear(4, 2)).requires_grad
    assert not x.requires_grad
    assert keep_gradient_path(learned, torch.nn.Linear(4, 2)) is learned
    with torch.no_grad():
        assert not keep_gradient_path(x, torch.nn.Linear(4, 2)).requires_grad
