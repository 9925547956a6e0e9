"""The segments of samples that are longer than a row."""

from dataclasses import dataclass

import numpy as np

from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.plan.sample_lengths import SampleLengths


@dataclass(frozen=True, slots=True)
class Outlines:
    """The segments of some samples in reading order."""

    borders: np.ndarray
    """int64[samples + 1]; first segment of each sample, which has at least one."""
    is_image: np.ndarray
    """bool[segments]."""
    lengths: np.ndarray
    """int[segments]; tokens of each text and each image."""


def read_outlines(dataset: SampleLengths, samples: np.ndarray, image_tokens: ImageTokens) -> Outlines:
    """Return the outlines of some samples of a dataset, int64[n] and ascending."""
    borders, is_image, lengths = dataset.outlines(samples)
    lengths = lengths.copy()
    constant = image_tokens.constant
    lengths[is_image] = image_tokens.of_images(dataset.image_sizes(samples)) if constant is None else constant
    return Outlines(borders, is_image, lengths)
