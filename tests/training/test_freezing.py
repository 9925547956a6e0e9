"""Frozen parts, missing images and recomputation leave the gradients of the rest as they are."""

import pytest

from tests.support.configs import tiny_run
from tests.support.jobs import starting_from
from tests.support.overlap import OVERLAP

pytestmark = pytest.mark.distributed

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
# float32: sums in another order
TOLERANCE = 1e-5
FREEZE = {
    "all_learn": (),
    "tower_frozen": ("vision_model",),
    "projection_alone_learns": ("vision_model", "language_model"),
    "decoder_alone_learns": ("vision_model", "vision_projection"),
}


@pytest.fixture(scope="module")
def initial(workers, tmp_path_factory):
    run_dir = str(tmp_path_factory.mktemp("initial"))
    workers.run("tests.support.jobs:save_initial", 1, config=tiny_run(run_dir))
    return run_dir


def gradients(workers, initial, world_size, rows, *, parallel=None, **training):
    config = tiny_run(parallel=parallel, training={"global_batch_size": len(rows), **training})
    return workers.run(
        "tests.support.jobs:gradients_of_one_step", world_size, config=starting_from(config, initial), rows=rows
    )


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        scale = max(abs(first[name]), 1e-3)
        assert abs(first[name] - second[name]) <= TOLERANCE * scale, name


# Samples 0 to 7 of this set hold pictures, 8 to 15 none.
IMAGE_ROW, TEXT_ROW, ONE_IMAGE_ROW = [0, 1, 2], [8, 9], [3]


@pytest.mark.parametrize("freeze", FREEZE.values(), ids=FREEZE)
@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(2, OVERLAP), (2, {**TP2_SP, **OVERLAP}), (4, {**TP2_SP, **OVERLAP})],
    ids=["dp2", "tp2_sp", "tp2_dp2_sp"],
)
def test_a_rank_without_images_gets_exact_gradients(workers, initial, freeze, world_size, parallel):
    rows = [IMAGE_ROW, TEXT_ROW]  # with dp 2 the second rank has no image at all
    reference = gradients(workers, initial, 1, rows, freeze=freeze)[0]
    for answer in gradients(workers, initial, world_size, rows, parallel=parallel, freeze=freeze):
        assert_same(reference, answer)


def test_fewer_images_than_tensor_parallel_ranks_give_exact_gradients(workers, initial):
    rows = [ONE_IMAGE_ROW]
    reference = gradients(workers, initial, 1, rows)[0]
    for answer in gradients(workers, initial, 2, rows, parallel={**TP2_SP, **OVERLAP}):
        assert_same(reference, answer)


@pytest.mark.parametrize("freeze", FREEZE.values(), ids=FREEZE)
def test_full_recomputation_gives_the_same_gradients(workers, initial, freeze):
    rows = [IMAGE_ROW, TEXT_ROW]
    plain = gradients(workers, initial, 1, rows, freeze=freeze)[0]
    assert_same(plain, gradients(workers, initial, 1, rows, freeze=freeze, recompute="full")[0])


def test_recomputation_with_a_frozen_embedding_keeps_the_gradients_of_the_first_stage(workers, initial):
    """Nothing before the decoder requires a gradient: checkpointed layers would lose theirs without an error."""
    frozen = ("vision_model", "vision_projection", "language_model.embedding")
    answers = [
        workers.run(
            "tests.support.jobs:gradients_of_one_step",
            1,
            config=starting_from(tiny_run(training={"global_batch_size": 2, "recompute": recompute}), initial),
            rows=[IMAGE_ROW, TEXT_ROW],
            also_freeze=frozen,
        )[0]
        for recompute in ("none", "full")
    ]
    assert any(name.startswith("language_model.decoder") for name in answers[0])
    assert_same(*answers)
