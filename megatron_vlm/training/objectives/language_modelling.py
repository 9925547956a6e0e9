"""The loss of a micro-batch: a sum and a count; the division happens once, over the whole global batch."""

import torch
from torch import Tensor


def sum_by_dataset(losses: Tensor, label_datasets: Tensor, num_datasets: int) -> Tensor:
    """Sum losses and count labels of each dataset.

    Args:
        losses: float[k], one for each label.
        label_datasets: int64[k], the dataset of each label.
        num_datasets: datasets of the blend.

    Returns:
        float64[2, num_datasets]: sums, then counts.
    """
    sums = torch.zeros(2, num_datasets, dtype=torch.float64, device=losses.device)
    sums[0].index_add_(0, label_datasets, losses.detach().double())
    sums[1].index_add_(0, label_datasets, torch.ones_like(losses, dtype=torch.float64))
    return sums


def reduce_losses(output: Tensor, label_datasets: Tensor, num_datasets: int) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce the last stage's output as megatron-core's schedules expect it with `calculate_per_token_loss`.

    Args:
        output: float[1, k], the loss of each label.
        label_datasets: int64[k].
        num_datasets: datasets of the blend.

    Returns:
        The summed loss (a scalar with gradient), the number of labels (int32), and `sum_by_dataset` for the log. The
        schedule divides no tensor that is returned here: both sums are of their own.
    """
    losses = output.flatten().float()
    num_labels = torch.tensor(losses.numel(), dtype=torch.int32, device=losses.device)
    return losses.sum(), num_labels, sum_by_dataset(losses, label_datasets, num_datasets)
