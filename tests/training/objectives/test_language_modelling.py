from types import SimpleNamespace

import torch

from megatron_vlm.config.objectives.language_modelling import Config
from megatron_vlm.training.objectives.language_modelling import Objective, sum_by_dataset


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
