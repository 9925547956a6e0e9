import pytest

from megatron_vlm.config import derive_layout
from megatron_vlm.costs.time import gpu_hours, pipeline_bubble, stage_imbalance
from tests.support.configs import tiny_run


def bubble_of(**parallel):
    config = tiny_run(parallel=parallel, training={"global_batch_size": 8})
    return pipeline_bubble(config.parallel, derive_layout(config, parallel.get("pipeline_model_parallel_size", 1)))


def test_gpu_hours_are_operations_over_speed():
    assert gpu_hours(3.6e15, 1e12) == 1.0


def test_one_stage_has_no_bubble():
    assert bubble_of() == 0.0


def test_stages_wait_while_the_pipeline_fills_and_empties():
    # 8 micro-batches pass 4 stages in 11 turns; each stage is idle for 3 of them
    assert bubble_of(pipeline_model_parallel_size=4) == pytest.approx(3 / 11)


def test_two_chunks_a_stage_halve_the_wait():
    halved = bubble_of(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, overlap_p2p_comm=True)
    assert halved == pytest.approx(1 / 17)


def test_imbalance_is_the_slowest_stage_over_the_mean():
    assert stage_imbalance((0.25, 0.25, 0.25, 0.25)) == 0.0
    assert stage_imbalance((0.4, 0.2, 0.2, 0.2)) == pytest.approx(0.6)
