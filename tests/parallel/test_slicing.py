"""Together, the slices of all ranks are the whole batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.parallel.slicing import ContextShare, ImageShare, PackedBatch, RankSlice, slice_batch


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


@st.composite
def packed_batches(draw):
    """A micro-batch of samples that begin and end anywhere, and the number of context-parallel ranks that share it."""
    size = draw(st.integers(2, 4))
    num_positions = 2 * size * draw(st.integers(1, 6))
    inside = draw(st.sets(st.integers(1, num_positions - 1)))
    chosen = [
        np.array(sorted(draw(st.sets(st.integers(0, num_positions - 1)))), dtype=np.int64) for _ in ("label", "image")
    ]
    return size, PackedBatch(
        input_ids=100 + np.arange(num_positions),
        labels=200 + np.arange(num_positions),
        cu_seqlens=np.array([0, *sorted(inside), num_positions], dtype=np.int32),
        label_index=chosen[0],
        label_datasets=300 + chosen[0],
        image_token_index=chosen[1],
        num_images=0,
        images=[],
    )


@given(packed_batches())
def test_context_parallel_ranks_have_every_position_label_and_placeholder_once(drawn):
    size, batch = drawn
    slices = [slice_batch(batch, None, ContextShare(rank, size)) for rank in range(size)]
    assert {len(part.input_ids) for part in slices} == {len(batch.input_ids) // size}
    assert sorted(np.concatenate([part.input_ids for part in slices])) == batch.input_ids.tolist()
    for part in slices:
        positions = part.input_ids - 100
        assert (part.labels - 200).tolist() == positions.tolist()
        assert (part.label_datasets - 300).tolist() == positions[part.label_index].tolist()
        assert batch.image_token_index[part.context.image_index].tolist() == positions[part.image_token_index].tolist()
    found = [positions for part in slices for positions in (part.input_ids - 100)[part.label_index]]
    assert sorted(found) == batch.label_index.tolist()
    found = [positions for part in slices for positions in (part.input_ids - 100)[part.image_token_index]]
    assert sorted(found) == batch.image_token_index.tolist()


@given(packed_batches())
def test_a_context_parallel_rank_sees_of_each_sample_what_stands_before_its_positions(drawn):
    size, batch = drawn
    gathered = np.concatenate([ContextShare(rank, size).positions(len(batch.input_ids)) for rank in range(size)])
    starts = np.repeat(batch.cu_seqlens[:-1], np.diff(batch.cu_seqlens))
    for rank in range(size):
        part = slice_batch(batch, None, ContextShare(rank, size))
        positions, keys = part.input_ids - 100, gathered[part.context.key_index]
        assert part.context.position_ids.tolist() == (positions - starts[positions]).tolist()
        for segment in range(len(part.cu_seqlens) - 1):
            queries = positions[slice(*part.cu_seqlens[segment : segment + 2])]
            seen = keys[slice(*part.context.key_cu_seqlens[segment : segment + 2])]
            # The last query stands at the last key, and each one before it at the key before.
            assert seen.tolist() == list(range(starts[queries[0]], queries[-1] + 1))
            assert queries.tolist() == seen[-len(queries) :].tolist()


def test_chunks_of_two_context_parallel_ranks_written_out():
    assert [ContextShare(rank, 2).positions(8).tolist() for rank in (0, 1)] == [[0, 1, 6, 7], [2, 3, 4, 5]]


@given(size=st.integers(1, 6), chunk=st.integers(1, 5))
def test_context_parallel_ranks_see_as_many_earlier_positions(size, chunk):
    seen = {int((ContextShare(rank, size).positions(2 * size * chunk) + 1).sum()) for rank in range(size)}
    assert len(seen) == 1


def test_positions_that_do_not_divide_over_context_parallel_ranks_are_refused():
    with pytest.raises(ValueError, match="10 positions are not a multiple of 2 \\* 2 context-parallel ranks"):
        ContextShare(0, 2).positions(10)


def test_context_share_refuses_a_rank_outside_the_group():
    with pytest.raises(ValueError, match="context share 2 of 2"):
        ContextShare(2, 2)
