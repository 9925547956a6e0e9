from types import SimpleNamespace

import pytest
import torch

from megatron_vlm.config.objectives.language_modelling import Config
from megatron_vlm.training.objectives.language_modelling import Objective, _sum_masked, sum_by_dataset


def reduce(output, datasets):
    return Objective(Config()).reduce(
        output, SimpleNamespace(label_datasets=torch.tensor(datasets, dtype=torch.int64)), 2
    )


def test_sums_and_counts_are_of_each_dataset():
    sums = sum_by_dataset(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 0]), 3)
    assert sums.tolist() == [[5.0, 0.0, 2.0], [2.0, 0.0, 1.0]]


def test_a_division_in_place_by_the_schedule_leaves_the_logged_sums_alone():
    output = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True) * 1.0
    loss, num_labels, logged = reduce(output, [0, 0, 1])
    with torch.no_grad():
        loss /= 100
    assert int(num_labels) == 3
    assert logged.tolist() == [[3.0, 3.0], [2.0, 1.0]]


def test_a_micro_batch_without_labels_has_a_loss_of_zero_with_gradient():
    weight = torch.ones(4, 1, requires_grad=True)
    output = (torch.empty(0, 4) @ weight).view(1, 0)
    loss, num_labels, logged = reduce(output, [])
    loss.backward()
    assert loss.item() == 0.0
    assert int(num_labels) == 0
    assert logged.sum() == 0
    assert weight.grad.abs().sum() == 0


@pytest.mark.parametrize("num_labels", [0, 1, 1000])
def test_sums_over_masks_are_those_of_the_host(num_labels):
    losses, datasets = torch.rand(num_labels, dtype=torch.float64), torch.randint(3, (num_labels,))
    masked, summed = _sum_masked(losses, datasets, 3), sum_by_dataset(losses, datasets, 3)
    assert masked.dtype == summed.dtype == torch.float64
    # Double precision, in another order.
    torch.testing.assert_close(masked, summed, rtol=1e-12, atol=0)
    assert torch.equal(masked[1], summed[1])


def test_host_adds_the_losses_one_after_the_other():
    losses, expected = torch.rand(100), 0.0
    for loss in losses.double().tolist():
        expected += loss
    assert sum_by_dataset(losses, torch.zeros(100, dtype=torch.int64), 1)[0].item() == expected


def test_number_of_labels_is_not_copied_from_the_host(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("torch.tensor waits for the device")

    monkeypatch.setattr(torch, "tensor", refuse)
    output = torch.ones(1, 3)
    _, num_labels, _ = Objective(Config()).reduce(output, SimpleNamespace(label_datasets=torch.zeros(3).long()), 1)
    assert (num_labels.dtype, int(num_labels)) == (torch.int32, 3)
