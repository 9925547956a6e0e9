"""Slice a global batch for one rank: its rows, and its share of the positions and images of a micro-batch.

This is the only place that decides which rank computes what.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

Image = TypeVar("Image")


@dataclass(frozen=True, slots=True)
class ImageShare:
    """The images of a micro-batch that one of the ranks with the same rows encodes.

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


@dataclass(frozen=True, slots=True)
class ContextShare:
    """The positions of a micro-batch that one rank of the context-parallel group computes.

    The micro-batch is cut into 2 * size chunks of one length, wherever samples begin and end, and rank r has the chunks
    r and 2 * size - 1 - r: both together see about as many earlier positions as those of any other rank.

    Source: Llama 3, arXiv:2407.21783, section 3.3.2.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"context share {self.rank} of {self.size} does not exist; ranks count from 0")

    def positions(self, num_positions: int) -> np.ndarray:
        """Return int64[num_positions / size]: the positions of this rank, ascending.

        Raises:
            ValueError: they do not divide into 2 * size chunks.
        """
        if num_positions % (2 * self.size):
            raise ValueError(f"{num_positions} positions are not a multiple of 2 * {self.size} context-parallel ranks")
        chunks = np.arange(num_positions).reshape(2 * self.size, -1)
        return chunks[[self.rank, 2 * self.size - 1 - self.rank]].reshape(-1)


_ALL_POSITIONS = ContextShare()


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
    context_share: ContextShare = _ALL_POSITIONS
    """Positions that this rank computes."""

    def rows(self, index: int) -> range:
        """Return the rows of the global batch in micro-batch `index` of this rank, counted within the iteration.

        Row j of a global batch goes to rank j % data_parallel_size; the rows of a rank are cut into micro-batches in
        order.
        """
        first = self.data_parallel_rank + self.data_parallel_size * index * self.micro_batch_size
        return range(first, first + self.data_parallel_size * self.micro_batch_size, self.data_parallel_size)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ContextSlice:
    """What a context-parallel rank needs to know of the whole micro-batch.

    Its positions lie in n segments: the part of a sample inside a chunk. A segment attends to the keys of its sample
    from the beginning up to its own end, so that its last position sees the last of them.
    """

    position_ids: np.ndarray
    """int32[t / size]; where each position of this rank stands in its sample."""
    key_index: np.ndarray
    """int64[u]; rows of the keys that the segments see, one segment after the other, among the t keys of all ranks,
    gathered rank by rank."""
    key_cu_seqlens: np.ndarray
    """int32[n + 1]; borders of the segments in `key_index`."""
    image_index: np.ndarray
    """int64; rows of the image embeddings of the whole micro-batch that stand at positions of this rank."""


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
    context: ContextSlice | None = None
    """Where this is the slice of one of several context-parallel ranks."""


def slice_batch(
    batch: PackedBatch[Image], image_share: ImageShare | None, context_share: ContextShare = _ALL_POSITIONS
) -> PackedBatch[Image]:
    """Return one rank's slice of a micro-batch: its share of the positions and of the images.

    Tensor-parallel ranks have the same positions. Images are shared out apart from positions: features are exchanged.

    Args:
        batch: the whole micro-batch.
        image_share: the images of this rank; None if its pipeline stage needs none.
        context_share: the positions of this rank.

    Raises:
        ValueError: the positions do not divide over the context-parallel ranks.
    """
    first, last = (0, 0) if image_share is None else image_share.bounds(batch.num_images)
    mine = dataclasses.replace(batch, images=batch.images[first:last])
    return mine if context_share.size == 1 else _slice_positions(mine, context_share)


def _slice_positions(batch: PackedBatch[Image], share: ContextShare) -> PackedBatch[Image]:
    num_positions = len(batch.input_ids)
    mine = share.positions(num_positions)
    local = np.full(num_positions, -1)
    local[mine] = np.arange(len(mine))
    has_label, has_image = local[batch.label_index] >= 0, local[batch.image_token_index] >= 0
    starts = batch.cu_seqlens[np.searchsorted(batch.cu_seqlens, mine, side="right") - 1].astype(np.int64)
    is_border = (np.diff(mine) != 1) | (np.diff(starts) != 0)
    borders = np.concatenate([[0], np.flatnonzero(is_border) + 1, [len(mine)]])
    keys = [np.arange(starts[last], mine[last] + 1) for last in borders[1:] - 1]
    return dataclasses.replace(
        batch,
        input_ids=batch.input_ids[mine],
        labels=batch.labels[mine],
        cu_seqlens=borders.astype(np.int32),
        label_index=local[batch.label_index[has_label]],
        label_datasets=batch.label_datasets[has_label],
        image_token_index=local[batch.image_token_index[has_image]],
        context=ContextSlice(
            position_ids=(mine - starts).astype(np.int32),
            key_index=_rows_when_gathered(num_positions, share.size)[np.concatenate(keys)],
            key_cu_seqlens=np.cumsum([0, *map(len, keys)], dtype=np.int32),
            image_index=np.flatnonzero(has_image),
        ),
    )


def _rows_when_gathered(num_positions: int, size: int) -> np.ndarray:
    """Return int64[t]: the row of each position in a tensor that is gathered from the ranks, one after the other."""
    gathered = np.concatenate([ContextShare(rank, size).positions(num_positions) for rank in range(size)])
    return np.argsort(gathered)
