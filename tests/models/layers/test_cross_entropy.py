import torch
import torch.nn.functional as F

from megatron_vlm.models.layers.cross_entropy import cross_entropy


def test_loss_and_gradient_are_those_of_torch():
    logits = (30 * torch.randn(2, 5, 50)).requires_grad_()
    labels = torch.randint(0, 50, (2, 5))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 5)
    losses = cross_entropy(logits, labels)
    torch.testing.assert_close(losses, expected)
    weights = torch.rand(2, 5)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), logits)
    (ours,) = torch.autograd.grad((losses * weights).sum(), logits)
    torch.testing.assert_close(ours, theirs)


def test_a_certain_and_wrong_model_has_a_finite_loss():
    logits = torch.tensor([[1e4, 0.0, -1e4]])
    assert cross_entropy(logits, torch.tensor([2])).tolist() == [2e4]


def test_half_precision_logits_give_a_float32_loss_and_a_gradient_of_their_dtype():
    logits = torch.randn(4, 9, dtype=torch.bfloat16, requires_grad=True)
    losses = cross_entropy(logits, torch.arange(4))
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16


def test_no_label_is_no_loss():
    assert cross_entropy(torch.empty(1, 0, 9, requires_grad=True), torch.empty(1, 0, dtype=torch.int64)).numel() == 0
