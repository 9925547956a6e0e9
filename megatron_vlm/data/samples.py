"""A training sample: what shards hold, and what plan and loader hand out."""

from typing import NamedTuple

import numpy as np


class TextSegment(NamedTuple):
    """Consecutive tokens of a sample."""

    input_ids: np.ndarray
    """int32[n], n > 0."""
    train: bool
    """Whether the tokens are targets of the loss."""


class ImageSegment(NamedTuple):
    """One image of a sample."""

    encoded: bytes
    """JPEG, PNG, WEBP or GIF file."""


class EncodedSample(NamedTuple):
    """One training sample: text and images in reading order."""

    segments: tuple[TextSegment | ImageSegment, ...]
