"""Compare row lengths: how full rows of neighbouring lengths would be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vlm.config.blend import steps_of
from megatron_vlm.data.plan.blend import samples_per_pass
from megatron_vlm.data.plan.packing import ImageBudget, packed_utilisation
from megatron_vlm.data.plan.sample_lengths import SampleLengths, measure_images
from megatron_vlm.data.plan.sample_pool import Overflow
from megatron_vlm.data.plan.settings import PlanSettings

_NEIGHBOURS = range(-2, 5)
_STEPS_PER_ROW = 32
_MULTIPLE = 8
# Enough for three digits of the utilisation.
_MAX_SAMPLES = 1_000_000


@dataclass(frozen=True, slots=True)
class RowLength:
    """What would come of a row length."""

    seq_length: int
    utilisation: float
    """Fraction of the positions that hold a token."""
    too_long: float
    """Fraction of the samples that are longer than a row."""


def compare_row_lengths(settings: PlanSettings, datasets: Sequence[SampleLengths]) -> list[RowLength]:
    """Pack one pass over the blend into rows of the planned length and of lengths up to 12 % away.

    Of a blend that changes, it is a pass over the first step.

    A sample longer than a row counts as a full row, as full rows and a rest if it is split, and not at all if it is
    dropped. Images beyond `max_images_per_row` are not counted, but their tokens are. If a pass has more than a
    million samples, a million of them are drawn.

    Raises:
        ConfigError: the blend cannot be made from these datasets.
    """
    lengths, images = _draw_samples(settings, datasets)
    most = settings.max_images_per_row
    grain = math.lcm(_MULTIPLE, settings.sample_multiple)
    step = max(grain, settings.seq_length // _STEPS_PER_ROW // grain * grain)
    result = []
    for neighbour in _NEIGHBOURS:
        seq_length = settings.seq_length + neighbour * step
        if seq_length <= 0:
            continue
        packed, owner = _fit(lengths, seq_length, settings.overflow)
        if packed.size:
            budget = None if most is None else ImageBudget(np.minimum(images[owner], most), most)
            utilisation = packed_utilisation(packed, seq_length, settings.sample_multiple, budget)
            result.append(RowLength(seq_length, utilisation, float((lengths > seq_length).mean())))
    return result


def _fit(lengths: np.ndarray, seq_length: int, overflow: Overflow) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths that samples have in rows, and the sample each belongs to."""
    everyone = np.arange(len(lengths))
    if overflow == "drop":
        kept = everyone[lengths <= seq_length]
        return lengths[kept], kept
    if overflow == "split":
        whole, rest = np.divmod(lengths, seq_length)
        has_rest = rest > 0
        pieces = np.concatenate([np.full(whole.sum(), seq_length), rest[has_rest]])
        return pieces, np.concatenate([np.repeat(everyone, whole), everyone[has_rest]])
    return np.minimum(lengths, seq_length), everyone


def choose_row_length(candidates: Sequence[RowLength], seq_length: int) -> RowLength:
    """Return the candidate that wastes least among those that cut no more samples than `seq_length` does."""
    planned = next(candidate for candidate in candidates if candidate.seq_length == seq_length)
    allowed = [candidate for candidate in candidates if candidate.too_long <= planned.too_long]
    return max(allowed, key=lambda candidate: candidate.utilisation)


def _draw_samples(settings: PlanSettings, datasets: Sequence[SampleLengths]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and the images of samples of one pass."""
    # Of a blend that changes, the first step.
    step = steps_of(settings.blend)[0]
    datasets = [datasets[place] for place in step.datasets]
    totals = [int(dataset.num_images.sum(dtype=np.int64)) for dataset in datasets]
    per_pass = samples_per_pass(step.entries, [len(dataset) for dataset in datasets], totals)
    fraction = min(1.0, _MAX_SAMPLES / per_pass.sum())
    rng = np.random.default_rng(settings.seed)
    drawn, images = [], []
    for dataset, number in zip(datasets, per_pass * fraction, strict=True):
        total = measure_images(dataset, settings.image_tokens).lengths + dataset.text_lengths
        whole, part = divmod(max(1, round(float(number))), len(total))
        chosen = rng.choice(len(total), part, replace=False)
        drawn += [total] * whole + [total[chosen]]
        images += [dataset.num_images] * whole + [dataset.num_images[chosen]]
    return np.concatenate(drawn), np.concatenate(images)
