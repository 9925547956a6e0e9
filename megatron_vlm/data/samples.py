"""A training sample, as shards store it and as plan and loader use it."""

from dataclasses import dataclass
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
    size: tuple[int, int] | None = None
    """Width and height of the upright image [pixels]; None if not measured. Shards always have it."""
    fault: str | None = None
    """Why the bytes are not those that were prepared; None: they are."""


class EncodedSample(NamedTuple):
    """One training sample: text and images in reading order."""

    segments: tuple[TextSegment | ImageSegment, ...]


@dataclass(frozen=True, slots=True)
class Outlines:
    """The segments of some samples in reading order, without their content."""

    borders: np.ndarray
    """int64[samples + 1]; first segment of each sample, which has at least one."""
    is_image: np.ndarray
    """bool[segments]."""
    is_trained: np.ndarray
    """bool[segments]; whether the tokens are targets of the loss."""
    lengths: np.ndarray
    """int[segments]; tokens of each text and each image. Shards do not know those of images and say 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFacts:
    """Which tokenizer made the token ids; training with another one is refused."""

    name: str
    sha256: str
    vocab_size: int
    bos_id: int | None
    """None: samples begin without BOS."""
    eos_id: int
