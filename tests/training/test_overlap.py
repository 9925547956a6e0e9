"""Ranks that hold different numbers of images start the same collectives, in the same order."""

import pytest

from tests.support.configs import tiny_run
from tests.support.overlap import OVERLAP

pytestmark = pytest.mark.distributed

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
# Of `pictures_then_text`: row j goes to data-parallel rank j % size.
IMAGES, OTHER_IMAGES, ONE_IMAGE, TEXT, EMPTY = [0, 1, 2], [4, 5], [3], [8, 9], []
TOWER, VISION = ("vision_model",), ("vision_model", "vision_projection")


def config_of(rows, parallel, freeze, precision="fp32"):
    training = {"global_batch_size": len(rows), "freeze": freeze, "precision": precision}
    # No clipping: the norm of the gradients is summed in another order where they lie in other buckets.
    return tiny_run(parallel=parallel, training=training, optimizer={"clip_grad": 1e6})


# Ranks, layout, rows, what is frozen.
ORDERS = {
    "dp2_text_row": (2, {}, [IMAGES, TEXT], ()),
    "dp2_text_row_tower_frozen": (2, {}, [IMAGES, TEXT], TOWER),
    "dp3_text_and_empty_row": (3, {}, [TEXT, IMAGES, EMPTY], ()),
    "tp2_dp2_fewer_images_than_ranks": (4, TP2, [IMAGES, ONE_IMAGE], ()),
    "tp2_dp2_text_row_tower_frozen": (4, TP2, [TEXT, OTHER_IMAGES], TOWER),
}


def orders(workers, world_size, parallel, rows, freeze, **settings):
    """Return what each rank of each data-parallel group starts."""
    config = config_of(rows, {**parallel, **OVERLAP}, freeze)
    job = "tests.support.overlap:order_of_collectives"
    answers = workers.run(job, world_size, timeout=60, config=config, rows=rows, **settings)
    size = config.parallel.tensor_model_parallel_size
    return [answers[first::size] for first in range(size)]


@pytest.mark.parametrize("case", [*ORDERS.values(), (2, {}, [IMAGES, TEXT], VISION)], ids=[*ORDERS, "vision_frozen"])
def test_all_ranks_start_the_same_collectives_in_the_same_order(workers, case):
    for first, *others in orders(workers, *case):
        buckets = {number for _, number in first}
        assert len(buckets) > 2
        # Twice, because there are two passes.
        assert sorted(first) == sorted([(kind, number) for kind in ("gather", "reduce") for number in buckets] * 2)
        assert all(other == first for other in others)


@pytest.mark.parametrize("case", ORDERS.values(), ids=ORDERS)
def test_they_would_not_if_ranks_without_images_skipped_the_tower(workers, case):
    groups = orders(workers, *case, skip_empty_shares=True)
    assert any(other != first for first, *others in groups for other in others)


# Several micro-batches, so that the last one, which starts the reductions, differs from the first.
RUNS = {
    "dp2": (2, {}, [IMAGES, TEXT, TEXT, OTHER_IMAGES]),
    "dp3": (3, {}, [TEXT, IMAGES, OTHER_IMAGES, ONE_IMAGE, EMPTY, TEXT]),
    "tp2_dp2": (4, TP2, [IMAGES, ONE_IMAGE, TEXT, OTHER_IMAGES]),
}


@pytest.mark.parametrize("freeze", [(), TOWER], ids=["all_learn", "tower_frozen"])
@pytest.mark.parametrize("layout", RUNS)
def test_bf16_losses_and_gradients_are_those_without_overlap(workers, layout, freeze):
    assert_overlap_changes_nothing(workers, *RUNS[layout], freeze, "bf16")


@pytest.mark.parametrize("rows", [RUNS["dp2"][2], [IMAGES, OTHER_IMAGES]], ids=["text_rows", "images_everywhere"])
def test_fp32_losses_and_gradients_are_those_without_overlap(workers, rows):
    assert_overlap_changes_nothing(workers, 2, {}, rows, (), "fp32")


def assert_overlap_changes_nothing(workers, world_size, parallel, rows, freeze, precision):
    plain, overlapped = (
        workers.run(
            "tests.support.overlap:train_and_validate",
            world_size,
            timeout=60,
            config=config_of(rows, {**parallel, **more}, freeze, precision),
            rows=rows,
            num_steps=3,
        )[0]
        for more in ({}, OVERLAP)
    )
    assert overlapped.num_buckets > 2 > plain.num_buckets
    assert overlapped.losses == plain.losses
    assert overlapped.validation_losses == plain.validation_losses
    # A float32 norm, summed shard by shard.
    assert overlapped.grad_norms == pytest.approx(plain.grad_norms, rel=1e-6)
