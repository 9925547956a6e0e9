"""The optimizer's state over several gradient buckets, some of which end with padding."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_vlm.checkpoint.optimizer_state import describe_optimizer
from tests.support.bucket_jobs import NUM_SAMPLES
from tests.support.configs import SEQ_LENGTH, tiny_run
from tests.support.samples import make_samples, pack_in_order, sample_length

pytestmark = pytest.mark.distributed

BEFORE, AFTER, GLOBAL_BATCH_SIZE = 2, 2, 6
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 3500}
# Another layout adds the same numbers up in another order (float32).
TOLERANCE = 1e-5
LAYOUTS = {
    "dp2": (2, {}, {}),
    "dp3_bf16": (3, {}, {"precision": "bf16"}),
    "pp2_virtual2_dp2": (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "overlap_p2p_comm": True,
        },
        {"global_batch_size": 4},
    ),
    "tp2_dp2_bf16_frozen_tower": (
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"precision": "bf16", "freeze": ("vision_model",)},
    ),
}


def rows():
    lengths = [sample_length(placed.sample, 16) for placed in make_samples(NUM_SAMPLES)]
    packed = pack_in_order(lengths, SEQ_LENGTH)
    return packed + [[] for _ in range(GLOBAL_BATCH_SIZE * (BEFORE + AFTER) - len(packed))]


def run_of(folder, parallel, training):
    return tiny_run(
        str(folder), parallel={**OVERLAP, **parallel}, training={"global_batch_size": GLOBAL_BATCH_SIZE, **training}
    )


def go(workers, config, world_size, before=0, after=AFTER, learning=""):
    return workers.run(
        "tests.support.bucket_jobs:go",
        world_size,
        config=config,
        rows=rows(),
        before=before,
        after=after,
        learning=learning,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padded_buckets_resume_bit_equal(workers, tmp_path, layout):
    world_size, parallel, training = LAYOUTS[layout]
    config = run_of(tmp_path, parallel, training)
    whole = go(workers, config, world_size, before=BEFORE)
    assert any(rank.num_padded for rank in whole)
    resumed = go(workers, config, world_size)
    assert resumed[-1].losses == whole[-1].losses


def test_padded_buckets_go_on_at_another_layout(workers, tmp_path):
    config = run_of(tmp_path, {}, {})
    whole = go(workers, config, 3, before=BEFORE)
    assert whole[0].num_padded
    for world_size, parallel in ((2, {"ddp_bucket_size": 9000}), (2, {"tensor_model_parallel_size": 2})):
        moved = replace(config, parallel=run_of(tmp_path, parallel, {}).parallel)
        resumed = go(workers, moved, world_size)
        expected = [float.fromhex(loss) for loss in whole[-1].losses]
        assert [float.fromhex(loss) for loss in resumed[-1].losses] == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("training", [{}, {"precision": "bf16"}], ids=["fp32", "bf16"])
def test_what_is_saved_is_what_the_ranks_hold(workers, tmp_path, training):
    config = run_of(tmp_path, {}, training)
    results = workers.run("tests.support.bucket_jobs:differences", 3, config=config, rows=rows())
    assert all(num_compared > 20 for num_compared, _ in results)
    assert [wrong for _, wrong in results] == [[], [], []]


def test_a_rank_that_owns_nothing_saves_and_resumes(workers, tmp_path):
    """One bias of 64 values learns: its buffer of 128 is padding on the second rank."""
    config = run_of(
        tmp_path, {"overlap_grad_reduce": False, "overlap_param_gather": False, "ddp_bucket_size": None}, {}
    )
    arguments = {"learning": "vision_projection.encoder.linear_fc2.bias"}
    whole = go(workers, config, 2, before=BEFORE, **arguments)
    assert [rank.num_owned for rank in whole] == [1, 0]
    assert go(workers, config, 2, **arguments)[-1].losses == whole[-1].losses


def test_rank_that_trains_nothing_has_no_entry_that_the_others_lack():
    assert describe_optimizer(SimpleNamespace(optimizer=None), {}) == {"step": 0}
