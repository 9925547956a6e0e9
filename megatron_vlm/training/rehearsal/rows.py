"""Made-up micro-batches of a rank, for shards that do not exist yet: rows with many, no and few images in turn."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from megatron_vlm.config import TrainConfig
from megatron_vlm.costs.rows import TEXT_OF_PAIR, most_pairs
from megatron_vlm.data.loading.batch import VLMBatch
from megatron_vlm.data.loading.collate import Collation, PlacedSample, collate
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment
from megatron_vlm.parallel.slicing import RankSlice
from megatron_vlm.training.rehearsal.job import FEW_IMAGES, most_in_flight

_TOKEN = 5
"""Any token of the vocabulary that is no control token."""


def image_counts(most: int, num_full: int, count: int, data_parallel_rank: int) -> list[int]:
    """Return the images in the rows of one rank's micro-batches.

    The first data-parallel rank begins with as many full rows as the pipeline holds; the others begin elsewhere in the
    same order, so that ranks differ in every micro-batch.

    Args:
        most: images that fit into a row.
        num_full: rows with so many images before those with fewer.
        count: micro-batches.
        data_parallel_rank: whose micro-batches they are.
    """
    order = [most] * num_full + [min(few, most) for few in FEW_IMAGES]
    first = num_full - 1 + data_parallel_rank if data_parallel_rank else 0
    return [order[(first + index) % len(order)] for index in range(count)]


class MadeUpRows:
    """An endless iterator over micro-batches, collated like those of the loader."""

    def __init__(self, config: TrainConfig, rank_slice: RankSlice, num_micro_batches: int) -> None:
        self.collation = Collation.from_config(config.model, config.data)
        self.rank_slice, self.num_rows = rank_slice, config.training.micro_batch_size
        self.pair_size = config.model.fixed_image_tokens("a rehearsal with made-up rows") + TEXT_OF_PAIR
        most, num_full = most_pairs(config.data, self.pair_size), most_in_flight(config.parallel)
        counts = image_counts(most, num_full, num_micro_batches, rank_slice.data_parallel_rank)
        self._picture = _encode_picture(config.model.vision.image_size)
        self._batches = self._endless(counts)

    def __next__(self) -> VLMBatch:
        return next(self._batches)

    def __iter__(self) -> Iterator[VLMBatch]:
        return self

    def _endless(self, counts: list[int]) -> Iterator[VLMBatch]:
        while True:
            for count in counts:
                rows, mine = [self._row(count)] * self.num_rows, self.rank_slice
                yield collate(rows, self.collation, mine.image_share, mine.context_share)

    def _row(self, num_images: int) -> list[PlacedSample]:
        """Return pairs of an image and a caption, then text up to the end of the row."""
        side, left = self.collation.image_size, self.collation.seq_length - num_images * self.pair_size
        image = ImageSegment(self._picture, (side, side))
        samples = [EncodedSample((_text(1), image, _text(TEXT_OF_PAIR - 1)))] * num_images
        if left:
            samples.append(EncodedSample((_text(left),)))
        return [PlacedSample(sample, 0, 0, "a made-up sample") for sample in samples]


def _text(size: int) -> TextSegment:
    return TextSegment(np.full(size, _TOKEN, dtype=np.int32), True)


def _encode_picture(side: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side)).save(stream, "JPEG")
    return stream.getvalue()
