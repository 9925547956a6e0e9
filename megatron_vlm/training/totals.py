"""Sum the results of a global batch over all ranks in one collective, and check that it was the planned batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import isfinite

import torch
from torch import Tensor

from megatron_vlm.config import NumericError
from megatron_vlm.data.plan.plan import Plan
from megatron_vlm.data.plan.row_hash import HASH_BITS, hash_rows
from megatron_vlm.parallel.groups import RankLayout
from megatron_vlm.training.batch_counts import BatchCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over the ranks, the same on each of them."""

    losses: list[float]
    """Sum of the losses of each dataset."""
    labels: list[float]
    """Labels of each dataset."""
    num_tokens: int
    num_positions: int
    num_images: int
    attention_pairs: int
    dataset_samples: tuple[int, ...]
    """Of each dataset; of a long sample, only its first fragment."""
    dataset_tokens: tuple[int, ...]
    """Of each dataset, without padding."""
    images_of_ranks: tuple[int, ...]
    """Images in the rows of each data-parallel rank."""
    data_wait: float
    """Mean time that a data-parallel rank waited for its micro-batches [s]."""
    stop_requested: bool
    """Whether a rank was told to stop."""
    num_bad_images: int
    """Images that could not be read; one that several ranks decode is counted by each."""
    sample_hash: int
    """Of the samples whose loss was computed."""
    sample_hash_of_all: int
    """Summed over all ranks and their model chunks, each of which loads its own micro-batches."""
    grad_norm: float
    """Before clipping; 0 where no gradient was computed."""

    @property
    def loss(self) -> float | None:
        """Mean over all labels; None without any."""
        return mean_loss(sum(self.losses), sum(self.labels))

    @property
    def is_finite(self) -> bool:
        """Whether loss, if there is one, and gradient norm are."""
        return (self.loss is None or isfinite(self.loss)) and isfinite(self.grad_norm)


def sum_over_ranks(
    sums: Sequence[Tensor],
    counts: Sequence[BatchCounts],
    rank: RankLayout,
    *,
    num_datasets: int,
    stop_requested: bool,
    device: torch.device,
    grad_norm: Tensor | None = None,
) -> Totals:
    """Sum the results of all ranks; all ranks call it together.

    Args:
        sums: float64[2, num_datasets] of each micro-batch, where this rank computes the loss; see `Objective.reduce`.
        counts: of each model chunk of this rank.
        rank: where this rank stands.
        num_datasets: datasets of the blend.
        stop_requested: whether this rank was told to stop.
        device: of the collective.
        grad_norm: float64[] on the device, the same on every rank; it is read together with the sums.
    """
    losses = torch.zeros(2 * num_datasets, dtype=torch.float64, device=device)
    counted, sample_hash = [0] * (4 + 2 * num_datasets + rank.dp_size), 0
    if rank.is_last_stage and rank.tp_rank == 0:
        for part in sums:
            losses += part.flatten()
    # Context-parallel ranks have labels of their own, and all counts of the same rows.
    if rank.is_last_stage and rank.tp_rank == rank.cp_rank == 0:
        last = counts[-1]
        counted = [last.num_tokens, last.num_positions, last.num_images, last.attention_pairs]
        counted += [last.dataset_samples[entry] for entry in range(num_datasets)]
        counted += [last.dataset_tokens[entry] for entry in range(num_datasets)]
        counted += [last.num_images * (place == rank.dp_rank) for place in range(rank.dp_size)]
        sample_hash = last.sample_hash
    waits = rank.is_first_stage and rank.tp_rank == rank.cp_rank == 0
    data_wait = counts[-1].data_wait / rank.dp_size if waits else 0.0
    hash_of_all = sum(count.sample_hash for count in counts) % (1 << HASH_BITS)
    num_bad = sum(len(count.bad_images) for count in counts)
    measured = [*counted, data_wait, stop_requested, num_bad, *_halves(sample_hash), *_halves(hash_of_all)]
    totals = torch.cat([losses, losses.new_zeros(len(measured))])
    for place, value in enumerate(measured, start=len(losses)):
        if value:  # filled on the device: a copy from the host would wait for everything before it
            totals[place].fill_(float(value))
    if rank.world_size > 1:
        torch.distributed.all_reduce(totals)
    norm = totals.new_zeros(1) if grad_norm is None else grad_norm.reshape(1)
    values = torch.cat([totals, norm]).tolist()  # the only time in a step that the host waits for the device
    numbers = iter(values)
    (
        losses_of,
        labels_of,
        (tokens, positions, images, pairs),
        samples_of,
        tokens_of,
        images_of,
        (data_wait, stops, bad),
        halves,
    ) = (
        list(islice(numbers, count))
        for count in (num_datasets, num_datasets, 4, num_datasets, num_datasets, rank.dp_size, 3, 4)
    )
    return Totals(
        losses=losses_of,
        labels=labels_of,
        num_tokens=int(tokens),
        num_positions=int(positions),
        num_images=int(images),
        attention_pairs=int(pairs),
        dataset_samples=tuple(map(int, samples_of)),
        dataset_tokens=tuple(map(int, tokens_of)),
        images_of_ranks=tuple(map(int, images_of)),
        data_wait=data_wait,
        stop_requested=stops > 0,
        num_bad_images=int(bad),
        sample_hash=_whole(*halves[:2]),
        sample_hash_of_all=_whole(*halves[2:]),
        grad_norm=next(numbers),
    )


def _halves(value: int) -> tuple[int, int]:
    """Split a hash so that float64 sums of both halves are exact over two million ranks."""
    return divmod(value, 1 << 32)


def _whole(high: float, low: float) -> int:
    return ((int(high) << 32) + int(low)) % (1 << HASH_BITS)


def check_samples(totals: Totals, plan: Plan, index: int, rank: RankLayout, *, num_chunks: int, batch: str) -> None:
    """Check that the ranks consumed the planned samples, each in its place; every rank comes to the same result.

    Args:
        totals: of the global batch.
        plan: says which samples they should be.
        index: of the global batch in the plan.
        rank: any rank of the layout.
        num_chunks: model chunks of each rank.
        batch: names the global batch in the error.

    Raises:
        NumericError: they did not.
    """
    sample_ids, samples_per_row = plan.rows(index)
    planned = hash_rows(sample_ids, samples_per_row, range(len(samples_per_row)))
    planned_of_all = planned * rank.tp_size * rank.cp_size * rank.pp_size * num_chunks % (1 << HASH_BITS)
    if (totals.sample_hash, totals.sample_hash_of_all) == (planned, planned_of_all):
        return
    is_loss = totals.sample_hash != planned
    found = f"with hash {totals.sample_hash:016x}" if is_loss else "on a rank that computes no loss"
    raise NumericError(
        f"the samples consumed at {batch} {found} are not the planned ones, {planned:016x}",
        fix="run the same command again to resume before this step; if the error returns, it is a bug in data loading",
    )


def mean_loss(losses: float, labels: float) -> float | None:
    """Return a sum of losses over its number of labels; None without any."""
    return losses / labels if labels else None


def losses_by_name(names: Sequence[str], losses: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Return the mean loss under each name of a dataset that has labels.

    Datasets of one name, such as the parts of a split one, count together.
    """
    sums: dict[str, tuple[float, float]] = {}
    for name, loss, number in zip(names, losses, labels, strict=True):
        before, number_before = sums.get(name, (0.0, 0.0))
        sums[name] = (before + loss, number_before + number)
    return {name: loss / number for name, (loss, number) in sums.items() if number}
