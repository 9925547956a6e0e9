"""Next-token prediction. Losses are sums with counts; the one division is over the whole global batch."""

from typing import Any

import torch
from torch import Tensor

from megatron_vlm.config.objectives.language_modelling import Config
from megatron_vlm.data.loading.batch import VLMBatch
from megatron_vlm.training.objective import run_model


class Objective:
    """Cross-entropy of the tokens that are trained on."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def forward(self, model: Any, batch: VLMBatch) -> Tensor:
        """Return float[1, k], the loss of each label, on the last stage."""
        return run_model(model, batch)

    def reduce(self, output: Tensor, batch: VLMBatch, num_datasets: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sum the losses; the schedule divides the first sum in place, so the logged sums are separate tensors."""
        losses = output.flatten().float()
        # torch.tensor would copy from the host, which waits until the device has finished the forward pass.
        num_labels = torch.full((), losses.numel(), dtype=torch.int32, device=losses.device)
        return losses.sum(), num_labels, sum_by_dataset(losses, batch.label_datasets, num_datasets)


def sum_by_dataset(losses: Tensor, label_datasets: Tensor, num_datasets: int) -> Tensor:
    """Sum losses and count labels of each dataset, with the same bits in every run.

    Args:
        losses: float[k], one for each label.
        label_datasets: int64[k], the dataset of each label.
        num_datasets: datasets of the blend.

    Returns:
        float64[2, num_datasets]: sums, then counts.
    """
    losses = losses.detach().double()
    if losses.is_cuda:
        return _sum_masked(losses, label_datasets, num_datasets)
    sums = torch.zeros(2, num_datasets, dtype=torch.float64, device=losses.device)
    sums[0].index_add_(0, label_datasets, losses)
    sums[1].index_add_(0, label_datasets, torch.ones_like(losses))
    return sums


def _sum_masked(losses: Tensor, label_datasets: Tensor, num_datasets: int) -> Tensor:
    """Sum over one mask per dataset; `index_add_` on a GPU adds in the order in which its threads come along."""
    is_of_dataset = label_datasets == torch.arange(num_datasets, device=losses.device).unsqueeze(1)  # [datasets, k]
    return torch.stack([torch.where(is_of_dataset, losses, 0.0).sum(dim=1), is_of_dataset.sum(dim=1).double()])
