"""Together, the slices of all ranks are the whole batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.parallel.slicing import ImageShare, PackedBatch, RankSlice, slice_batch


def make_batch(num_images: int) -> PackedBatch[str]:
    empty = np.empty(0, dtype=np.int64)
    return PackedBatch(
        input_ids=np.arange(8),
        labels=np.arange(8),
        cu_seqlens=np.array([0, 8], dtype=np.int32),
        label_index=empty,
        label_datasets=empty,
        image_token_index=np.arange(num_images),
        num_images=num_images,
        images=[f"image {index}" for index in range(num_images)],
    )


@given(size=st.integers(1, 5), micro_batch_size=st.integers(1, 4), num_micro_batches=st.integers(1, 4))
def test_ranks_have_every_row_once(size, micro_batch_size, num_micro_batches):
    slices = [
        RankSlice(data_parallel_rank=rank, data_parallel_size=size, micro_batch_size=micro_batch_size)
        for rank in range(size)
    ]
    rows = [row for place in slices for index in range(num_micro_batches) for row in place.rows(index)]
    assert sorted(rows) == list(range(size * micro_batch_size * num_micro_batches))


def test_rows_of_two_ranks_written_out():
    second = RankSlice(data_parallel_rank=1, data_parallel_size=2, micro_batch_size=2)
    assert [list(second.rows(index)) for index in (0, 1)] == [[1, 3], [5, 7]]


@given(num_images=st.integers(0, 20), size=st.integers(1, 6))
def test_tensor_parallel_ranks_have_every_image_once_and_all_positions(num_images, size):
    batch = make_batch(num_images)
    slices = [slice_batch(batch, ImageShare(rank, size)) for rank in range(size)]
    assert [image for part in slices for image in part.images] == batch.images
    assert all(part.input_ids is batch.input_ids and part.num_images == num_images for part in slices)


def test_stage_without_pixels_has_no_images():
    mine = slice_batch(make_batch(3), None)
    assert (list(mine.images), mine.num_images) == ([], 3)


@given(num_images=st.integers(0, 40), size=st.integers(1, 9))
def test_image_shares_cover_every_image_once_and_in_order(num_images, size):
    owned = [index for rank in range(size) for index in range(*ImageShare(rank, size).bounds(num_images))]
    assert owned == list(range(num_images))


@given(num_images=st.integers(0, 40), size=st.integers(1, 9))
def test_no_image_share_exceeds_images_per_rank(num_images, size):
    sizes = [last - first for first, last in (ImageShare(rank, size).bounds(num_images) for rank in range(size))]
    assert max(sizes) == ImageShare(0, size).images_per_rank(num_images)


def test_image_share_refuses_a_rank_outside_the_group():
    with pytest.raises(ValueError, match="image share 2 of 2"):
        ImageShare(2, 2)
