"""What a run will hold and cost before it starts: from settings and sample lengths, without a GPU or torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vlm.config import TrainConfig
from megatron_vlm.costs.flops import StepFlops, Work, step_flops
from megatron_vlm.costs.parameters import stage_sizes
from megatron_vlm.data.plan.balance_report import Balance, report_balance
from megatron_vlm.data.plan.plan import PlannedRows, PlanSettings, PlanSummary, plan_rows
from megatron_vlm.data.shards.dataset import ShardedDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """A whole run in figures."""

    packing: PlanSummary
    num_labels: int
    """Tokens with a loss, from each dataset's share of trained tokens."""
    flops: float
    """Operations of all steps; padding and recomputation excluded."""
    stage_shares: tuple[float, ...]
    """Share of the operations that each pipeline stage does."""
    row_lengths: tuple[int, int]
    """Shortest and longest rows; they differ between global batches where lengths are clustered [tokens]."""
    balance: tuple[Balance, ...]
    """For the numbers of data-parallel ranks that were asked for."""


def foresee(
    config: TrainConfig, datasets: Sequence[ShardedDataset], data_parallel_sizes: Sequence[int] = ()
) -> Outlook:
    """Pack the data and count what all steps will do.

    Args:
        config: settings of the run.
        datasets: one per entry of the blend.
        data_parallel_sizes: numbers of data-parallel ranks for which the balance is simulated.

    Raises:
        ConfigError: the blend cannot be made from the datasets.
        DataError: with overflow "fail", a sample is longer than a row; with "split", an image is.
        UsageError: the balance is asked for a number of ranks that does not divide the global batch.
    """
    settings = PlanSettings.from_config(config)
    rows = plan_rows(settings, datasets)
    # As they are in the rows: cut samples are shorter, and fragments have lengths of their own.
    used = rows.pool.lengths[rows.sample_ids].astype(np.float64)
    work = Work(
        num_tokens=rows.summary.num_tokens,
        attention_pairs=int((used * (used + 1) / 2).sum()),
        num_labels=_count_labels(rows, datasets),
        num_images=rows.summary.num_images,
    )
    flops = step_flops(config.model, config.training.freeze, work)
    lengths = [settings.seq_length] if rows.seq_lengths is None else rows.seq_lengths.tolist()
    return Outlook(
        packing=rows.summary,
        num_labels=work.num_labels,
        flops=flops.total,
        stage_shares=_stage_shares(config, flops),
        row_lengths=(min(lengths), max(lengths)),
        balance=tuple(report_balance(settings, rows, data_parallel_sizes)) if data_parallel_sizes else (),
    )


def _count_labels(rows: PlannedRows, datasets: Sequence[ShardedDataset]) -> int:
    """Return the tokens with a loss, as if every text had its dataset's share of trained tokens."""
    pool = rows.pool
    labels = (pool.lengths - pool.image_lengths).astype(np.float64)
    counts = [dataset.manifest.counts for dataset in datasets]
    shares = np.array([count.trained_tokens / max(1, count.text_tokens) for count in counts])
    sizes = [len(dataset) for dataset in datasets]
    sources = np.searchsorted(np.cumsum(sizes), pool.fragments[0], side="right")
    labels *= np.concatenate([np.repeat(shares, sizes), shares[sources]])
    return int(labels[rows.sample_ids].sum())


def _stage_shares(config: TrainConfig, flops: StepFlops) -> tuple[float, ...]:
    layer = flops.decoder / config.model.language.num_layers
    stages = [size.num_layers * layer for size in stage_sizes(config)]
    stages[0] += flops.tower + flops.projection
    stages[-1] += flops.output
    return tuple(stage / sum(stages) for stage in stages)
