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


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFacts:
    """Which tokenizer made the token ids; training with another one is refused."""

    name: str
    sha256: str
    vocab_size: int
    bos_id: int | None
    """None: samples begin without BOS."""
    eos_id: int
