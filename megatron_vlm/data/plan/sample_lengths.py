"""What planning needs to know of a dataset."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.samples import Outlines


class SampleLengths(Protocol):
    """The lengths of the samples of a dataset; `ShardedDataset` has them."""

    fingerprint: str
    """Text that changes with the content."""

    @property
    def num_images(self) -> np.ndarray:
        """int32[samples]."""

    @property
    def text_lengths(self) -> np.ndarray:
        """int32[samples] [tokens]."""

    def __len__(self) -> int: ...

    def outlines(self, samples: np.ndarray) -> Outlines:
        """Return the segments of some samples, as `ShardedDataset.outlines` does."""

    def image_sizes(self, samples: np.ndarray | None = None) -> np.ndarray:
        """Return the sizes of the images of some samples (None: all), as `ShardedDataset.image_sizes` does."""


@dataclass(frozen=True, slots=True)
class ImageLengths:
    """The tokens of the images of a dataset."""

    lengths: np.ndarray
    """int32[samples]; tokens of all images of each sample."""
    tokens_per_image: tuple[int, int] | None
    """Fewest and most tokens of an image; None if there are no images and the number is not constant."""


def measure_images(dataset: SampleLengths, image_tokens: ImageTokens) -> ImageLengths:
    """Count the tokens of the images of each sample."""
    constant = image_tokens.constant
    if constant is not None:
        return ImageLengths(dataset.num_images * np.int32(constant), (constant, constant))
    tokens = image_tokens.of_images(dataset.image_sizes())
    total = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
    lengths = np.diff(total[np.cumsum(dataset.num_images, dtype=np.int64)], prepend=0).astype(np.int32)
    return ImageLengths(lengths, (int(tokens.min()), int(tokens.max())) if len(tokens) else None)
