"""What a run will hold and cost before it starts: from settings and sample lengths, without a GPU or torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vlm.config import TrainConfig
from megatron_vlm.config.size import stage_sizes
from megatron_vlm.data.plan import PlanSettings, PlanSummary, plan_rows
from megatron_vlm.data.shards import ShardedDataset
from megatron_vlm.training.flops import language_flops, projection_flops, step_flops, vision_flops


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

    @property
    def imbalance(self) -> float:
        """Return how much longer than the mean the slowest stage takes."""
        return max(self.stage_shares) * len(self.stage_shares) - 1

    def gpu_hours(self, flops_per_second: float) -> float:
        """Return the GPU hours at so many useful operations per second and GPU."""
        return self.flops / flops_per_second / 3600


def foresee(config: TrainConfig, datasets: Sequence[ShardedDataset]) -> Outlook:
    """Pack the data and count what all steps will do.

    Raises:
        ConfigError: the blend cannot be made from the datasets.
        DataError: with overflow "fail", a sample is longer than a row.
    """
    rows = plan_rows(PlanSettings.from_config(config), datasets)
    num_image_tokens = config.model.vision.num_image_tokens
    images = np.concatenate([dataset.num_images for dataset in datasets])
    text = np.concatenate([dataset.text_lengths for dataset in datasets])
    lengths = np.minimum(text + images.astype(np.int64) * num_image_tokens, config.data.seq_length)
    used = lengths[rows.sample_ids].astype(np.float64)
    counts = {
        "num_tokens": rows.summary.num_tokens,
        "attention_pairs": int((used * (used + 1) / 2).sum()),
        "num_labels": _count_labels(datasets, rows.sample_ids, text),
        "num_images": rows.summary.num_images,
    }
    return Outlook(
        packing=rows.summary,
        num_labels=counts["num_labels"],
        flops=step_flops(config.model, config.training.freeze, **counts),
        stage_shares=_stage_shares(config, **counts),
    )


def _count_labels(datasets: Sequence[ShardedDataset], sample_ids: np.ndarray, text: np.ndarray) -> int:
    trained = []
    for dataset in datasets:
        counts = dataset.manifest.counts
        trained.append(np.full(len(dataset), counts.trained_tokens / max(1, counts.text_tokens)))
    return int((text * np.concatenate(trained))[sample_ids].sum())


def _stage_shares(
    config: TrainConfig, *, num_tokens: int, attention_pairs: int, num_labels: int, num_images: int
) -> tuple[float, ...]:
    model, freeze = config.model, config.training.freeze
    decoder = language_flops(model.language, num_tokens, attention_pairs, 0) / model.language.num_layers
    head = language_flops(model.language, 0, 0, num_labels)
    decoder_factor = 2 if "language_model" in freeze else 3
    tower = vision_flops(model.vision, num_images) * (1 if "vision_model" in freeze else 3)
    tower += projection_flops(model, num_images) * 3
    work = [size.num_layers * decoder * decoder_factor for size in stage_sizes(config)]
    work[0] += tower
    work[-1] += head * decoder_factor
    return tuple(part / sum(work) for part in work)
