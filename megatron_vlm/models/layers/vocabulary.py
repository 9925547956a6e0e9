"""The end of the padded vocabulary: ids that no tokenizer has, which must not compete with those that it has.

The vocabulary is the same for every parallel layout: the entries of the tokenizer, the placeholder of images, padding,
and rows that round their number up. Published models have only the first, so the others are left out of every softmax:
their logits are -inf, their probabilities and gradients exactly zero. Rows that round up are zero, which weight decay
leaves as they are.
"""

import torch
from torch import Tensor


def count_rows(size: int, num_ids: int, tp_rank: int) -> int:
    """Return how many of this rank's rows belong to the first `num_ids` ids; they come first.

    Args:
        size: rows of the vocabulary of each tensor-parallel rank.
        num_ids: over all ranks.
        tp_rank: whose rows these are.
    """
    return min(max(num_ids - tp_rank * size, 0), size)


def exclude_ids(logits: Tensor, num_ids: int, tp_rank: int) -> None:
    """Set the logits of the ids from `num_ids` on to -inf, in place; logits is float[..., n] with n rows of a rank."""
    logits[..., count_rows(logits.size(-1), num_ids, tp_rank) :] = -torch.inf


@torch.no_grad()
def clear_rows(weight: Tensor, num_ids: int, tp_rank: int) -> None:
    """Set the rows of the ids from `num_ids` on to zero, in place; weight is float[n, h] with n rows of a rank."""
    weight[count_rows(weight.size(0), num_ids, tp_rank) :] = 0
