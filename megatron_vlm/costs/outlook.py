"""Forecast of a run from its settings and sample lengths, without a GPU or torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vlm.config import TrainConfig
from megatron_vlm.costs.flops import StepFlops, Work, step_flops
from megatron_vlm.costs.parameters import stage_layers
from megatron_vlm.data.plan.balance_report import Balance, report_balance
from megatron_vlm.data.plan.plan import PlannedRows, PlanSummary, plan_rows
from megatron_vlm.data.plan.settings import PlanSettings
from megatron_vlm.data.shards.dataset import ShardedDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """Figures for a whole run."""

    packing: PlanSummary
    work: Work
    """Contents of all steps; labels are estimated from the fraction of trained tokens in each dataset."""
    flops: float
    """Operations of all steps, without padding and recomputation."""
    stage_fractions: tuple[float, ...]
    """Fraction of the operations on each pipeline stage."""
    row_lengths: tuple[int, int]
    """Shortest and longest rows [tokens]; they differ if samples are clustered by length."""
    balance: tuple[Balance, ...]
    """For the requested numbers of data-parallel ranks."""


def foresee(
    config: TrainConfig, datasets: Sequence[ShardedDataset], data_parallel_sizes: Sequence[int] = ()
) -> Outlook:
    """Pack the data and count the operations of all steps.

    Args:
        config: settings of the run.
        datasets: one per entry of the blend.
        data_parallel_sizes: numbers of data-parallel ranks to simulate the balance for.

    Raises:
        ConfigError: the datasets do not allow this blend.
        DataError: a sample is longer than a row with overflow "fail", or an image is with "split".
        UsageError: a number of ranks does not divide the global batch.
    """
    settings = PlanSettings.from_config(config)
    rows = plan_rows(settings, datasets)
    # Lengths in the rows: samples may be cut or split into fragments.
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
        work=work,
        flops=flops.total,
        stage_fractions=_stage_fractions(config, flops),
        row_lengths=(min(lengths), max(lengths)),
        balance=tuple(report_balance(settings, rows, data_parallel_sizes)) if data_parallel_sizes else (),
    )


def _count_labels(rows: PlannedRows, datasets: Sequence[ShardedDataset]) -> int:
    """Return the tokens with a loss, as if every text had the same fraction of trained tokens as its dataset."""
    pool = rows.pool
    labels = (pool.lengths - pool.image_lengths).astype(np.float64)
    counts = [dataset.manifest.counts for dataset in datasets]
    for ids, count in zip(pool.usable, counts, strict=True):
        labels[ids] *= count.trained_tokens / max(1, count.text_tokens)
    return int(labels[rows.sample_ids].sum())


def _stage_fractions(config: TrainConfig, flops: StepFlops) -> tuple[float, ...]:
    stages = [sum(flops.layers[layer] for layer in layers) for layers in stage_layers(config.model, config.parallel)]
    stages[0] += flops.tower + flops.projection
    stages[-1] += flops.output
    return tuple(stage / sum(stages) for stage in stages)
