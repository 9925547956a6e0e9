"""Slice a global batch for one rank: its rows, and its share of the images of a micro-batch.

This is the only place that decides which rank computes what. A further way to split a batch, such as context
parallelism, is an addition to `slice_batch`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

Image = TypeVar("Image")


@dataclass(frozen=True, slots=True)
class ImageShare:
    """The images of a micro-batch that one rank of the tensor-parallel group encodes.

    With k = ceil(num_images / size), the rank owns the images [rank * k, min((rank + 1) * k, num_images)). All ranks
    but the last ones own k images, so an all-gather of k images per rank needs no exchange of sizes.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"image share {self.rank} of {self.size} does not exist; ranks count from 0")

    def images_per_rank(self, num_images: int) -> int:
        """Images of a full share; the last shares may have fewer."""
        return -(-num_images // self.size)

    def bounds(self, num_images: int) -> tuple[int, int]:
        """First image of this rank and the one after its last, out of `num_images` in reading order."""
        share = self.images_per_rank(num_images)
        first = min(self.rank * share, num_images)
        return first, min(first + share, num_images)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSlice:
    """The slice of every global batch that one rank computes; by default all of it."""

    data_parallel_rank: int = 0
    """This rank among those that have different rows."""
    data_parallel_size: int = 1
    """Number of them."""
    micro_batch_size: int = 1
    """Rows of a micro-batch."""
    image_share: ImageShare | None = ImageShare()
    """Images that this rank encodes; None where its pipeline stage needs no pixels."""

    def rows(self, index: int) -> range:
        """Return the rows of the global batch in micro-batch `index` of this rank, counted within the iteration.

        Row j of a global batch goes to rank j % data_parallel_size; the rows of a rank are cut into micro-batches in
        order.
        """
        first = self.data_parallel_rank + self.data_parallel_size * index * self.micro_batch_size
        return range(first, first + self.data_parallel_size * self.micro_batch_size, self.data_parallel_size)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBatch(Generic[Image]):
    """The rows of a micro-batch, one after the other: t positions, and indices into them."""

    input_ids: np.ndarray
    """int64[t]."""
    labels: np.ndarray
    """int64[t]."""
    cu_seqlens: np.ndarray
    """int32[n + 1]; segment borders, from 0 to t."""
    label_index: np.ndarray
    """int64[k]; positions that have a loss, ascending."""
    label_datasets: np.ndarray
    """int64[k]; blend entry that each of them comes from."""
    image_token_index: np.ndarray
    """int64; positions of the placeholders, image by image in reading order."""
    num_images: int
    """Images of the whole micro-batch."""
    images: Sequence[Image]
    """The images of this slice, in reading order."""
    image_lengths: tuple[int, ...] | None = None
    """Placeholders of each image of the whole micro-batch; None where every image has the same number."""


def slice_batch(batch: PackedBatch[Image], image_share: ImageShare | None) -> PackedBatch[Image]:
    """Return one rank's slice of a micro-batch.

    Every tensor-parallel rank gets all positions and its own share of the images.

    Args:
        batch: the whole micro-batch.
        image_share: the images of this rank; None if its pipeline stage needs none.
    """
    first, last = (0, 0) if image_share is None else image_share.bounds(batch.num_images)
    return dataclasses.replace(batch, images=batch.images[first:last])
