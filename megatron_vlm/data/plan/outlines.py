"""The segments of samples that are longer than a row, and what remains if their end is cut off."""

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


@dataclass(frozen=True, slots=True)
class Beginnings:
    """What remains of samples whose end is cut off."""

    lengths: np.ndarray
    """int64[samples] [tokens]."""
    num_images: np.ndarray
    """int64[samples]."""
    image_lengths: np.ndarray
    """int64[samples]; tokens of these images."""


def read_outlines(dataset: SampleLengths, samples: np.ndarray, image_tokens: ImageTokens) -> Outlines:
    """Return the outlines of some samples of a dataset.

    Args:
        dataset: one entry of the blend.
        samples: int64[n]; ascending.
        image_tokens: tokens of an image.
    """
    borders, is_image, lengths = dataset.outlines(samples)
    lengths = lengths.copy()
    if image_tokens.constant is not None:
        lengths[is_image] = image_tokens.constant
    else:
        lengths[is_image] = image_tokens.of_images(dataset.image_sizes(samples))
    return Outlines(borders, is_image, lengths)


def cut_outlines(outlines: Outlines, max_tokens: int) -> Beginnings:
    """Cut samples after the last whole image or token that fits in `max_tokens`."""
    borders, is_image = outlines.borders, outlines.is_image
    ends = np.cumsum(outlines.lengths, dtype=np.int64)
    starts = np.concatenate([[0], ends])[borders[:-1]]
    ends -= np.repeat(starts, np.diff(borders))
    fits = ends <= max_tokens
    whole = np.add.reduceat(fits, borders[:-1], dtype=np.int64)
    num_images = np.add.reduceat(fits & is_image, borders[:-1], dtype=np.int64)
    image_lengths = np.add.reduceat(np.where(fits & is_image, outlines.lengths, 0), borders[:-1], dtype=np.int64)
    last = borders[:-1] + whole - 1
    kept = np.where(whole > 0, ends[last], 0)
    cut_in_text = (whole < np.diff(borders)) & ~is_image[np.minimum(last + 1, len(is_image) - 1)]
    return Beginnings(np.where(cut_in_text, max_tokens, kept), num_images, image_lengths)
