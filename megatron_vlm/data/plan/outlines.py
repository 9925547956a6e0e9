"""The segments of samples that are longer than a row."""

from dataclasses import replace

import numpy as np

from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.plan.sample_lengths import SampleLengths
from megatron_vlm.data.samples import Outlines


def read_outlines(dataset: SampleLengths, samples: np.ndarray, image_tokens: ImageTokens) -> Outlines:
    """Return the outlines of some samples of a dataset, int64[n] and ascending, with the tokens of each image."""
    found = dataset.outlines(samples)
    lengths, constant = found.lengths.copy(), image_tokens.constant
    lengths[found.is_image] = image_tokens.of_images(dataset.image_sizes(samples)) if constant is None else constant
    return replace(found, lengths=lengths)
