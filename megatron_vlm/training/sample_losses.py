"""The loss of each sample of a global batch, by the computation of a training step."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from megatron_vlm.data.loading.reader import SampleReader
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.training.blend import OpenBlend
from megatron_vlm.training.gradients import compute_gradients
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.totals import Totals, check_samples, mean_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLoss:
    """A sample of a global batch."""

    row: int
    """Counted within the global batch."""
    sample_id: int
    """As the plan counts."""
    dataset: str
    where: str
    """Dataset, shard and sample; for a fragment, its tokens."""
    num_labels: int
    loss: float | None
    """Mean over its labels; None without any. A sample that stands in the batch twice has one loss for both."""

    @property
    def is_finite(self) -> bool:
        """Whether the loss is, or there is none."""
        return self.loss is None or math.isfinite(self.loss)


def losses_by_sample(state: TrainState, blend: OpenBlend, device: torch.device) -> tuple[list[SampleLoss], Totals]:
    """Compute the next global batch with its gradients, but without an update; all ranks call it together.

    Returns:
        Its samples, row by row; and the sums over the ranks, with one loss for each distinct sample.

    Raises:
        DataError: a sample cannot be read.
        NumericError: the ranks consumed samples other than the planned ones.
    """
    index = state.iteration
    sample_ids, samples_per_row = blend.plan.rows(index)
    distinct, places = np.unique(sample_ids, return_inverse=True)
    loaders = blend.start_loaders(state, device, index, by_sample=True)
    try:
        computed = compute_gradients(state, loaders, device=device, stop_requested=False, num_datasets=len(distinct))
    finally:
        for loader in loaders:
            loader.close()
    totals = computed.totals
    check_samples(totals, state.plan, index, state.rank, num_chunks=len(loaders), batch=f"iteration {index + 1}")
    reader = SampleReader(blend.datasets, blend.plan, ImageTokens.from_model(state.config.model))
    rows = np.repeat(np.arange(len(samples_per_row)), samples_per_row)
    found = [
        SampleLoss(
            row=row,
            sample_id=sample_id,
            dataset=reader.dataset_name(sample_id),
            where=reader.describe(sample_id),
            num_labels=int(totals.labels[place]),
            loss=mean_loss(totals.losses[place], totals.labels[place]),
        )
        for row, sample_id, place in zip(rows.tolist(), sample_ids.tolist(), places.tolist(), strict=True)
    ]
    return found, totals
