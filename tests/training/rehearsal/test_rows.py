import pytest

from megatron_vlm.costs.rows import TEXT_OF_PAIR
from megatron_vlm.parallel.slicing import ImageShare, RankSlice
from megatron_vlm.training.rehearsal.rows import MadeUpRows, image_counts
from tests.support.batches import validate
from tests.support.configs import SEQ_LENGTH, tiny_run

PAIR = 16 + TEXT_OF_PAIR


def test_first_rank_fills_the_pipeline_with_full_rows_and_the_others_differ_in_each_micro_batch():
    first, second = (image_counts(6, 2, 5, rank) for rank in (0, 1))
    assert first == [6, 6, 0, 1, 3]
    assert sorted(second) == sorted(first)
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_ranks_of_a_job_with_one_micro_batch_hold_many_no_one_and_three_images():
    assert [image_counts(6, 1, 1, rank) for rank in range(5)] == [[6], [0], [1], [3], [6]]


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("share", [ImageShare(), ImageShare(1, 2), None])
def test_rows_are_valid_micro_batches_of_the_run(share, micro_batch_size):
    config = tiny_run(training={"micro_batch_size": micro_batch_size})
    rank_slice = RankSlice(image_share=share, micro_batch_size=micro_batch_size)
    batches = MadeUpRows(config, rank_slice, num_micro_batches=4)
    seen = []
    for _, batch in zip(range(4), batches, strict=False):
        validate(batch, config.model.language, 16, share)
        assert batch.num_tokens == micro_batch_size * SEQ_LENGTH
        seen.append(batch.num_images)
    assert seen == [micro_batch_size * count for count in (SEQ_LENGTH // PAIR, 0, 1, 3)]
