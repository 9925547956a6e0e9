import dataclasses

import pytest

from megatron_vlm.config import derive_layout
from megatron_vlm.costs.cluster import Cluster
from megatron_vlm.costs.rows import pairs
from megatron_vlm.costs.step_time import predict_step
from megatron_vlm.costs.time import pipeline_bubble
from tests.support.configs import tiny_model, tiny_run


def run_of(tp=1, pp=1, batch=8, freeze=("vision_model",), **parallel):
    # Without images, and with a tiny vocabulary, all stages take the same time but for the loss.
    model = tiny_model(hidden_size=512, ffn_hidden_size=1024)
    layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, **parallel}
    return tiny_run(model=model, parallel=layout, training={"global_batch_size": batch, "freeze": freeze})


def step_of(config, world_size, images=True, **cluster):
    work = pairs(config)
    if not images:
        work = dataclasses.replace(work, num_images=0, num_labels=0)
    return predict_step(config, derive_layout(config, world_size), work, Cluster(gpu_name="A100", **cluster))


def test_one_rank_waits_for_nobody():
    spent = step_of(run_of(), 1).spent
    for name in ("bubble", "data_parallel", "tensor_parallel", "pipeline_parallel"):
        assert spent[name] == 0
    assert min(spent["products"], spent["attention"], spent["memory"], spent["tower"], spent["optimizer"]) > 0


@pytest.mark.parametrize("chunks", [None, 2])
def test_the_bubble_is_that_of_the_schedule_where_stages_are_equal(chunks):
    overlap = chunks is not None
    config = run_of(pp=2, batch=8, virtual_pipeline_model_parallel_size=chunks, overlap_p2p_comm=overlap)
    step = step_of(config, 2, images=False)
    passing = step.seconds - step.spent["optimizer"]
    # The stages differ by the sums of gradients of embedding and output layer.
    expected = pipeline_bubble(config.parallel, derive_layout(config, 2))
    assert step.spent["bubble"] / passing == pytest.approx(expected, rel=0.05)


def test_twice_the_micro_batches_take_less_than_twice_the_time_of_a_pipeline():
    few, many = (step_of(run_of(pp=2, batch=batch), 2).seconds for batch in (8, 16))
    assert many < 2 * few


def test_the_stage_with_the_tower_is_the_slowest_and_a_smaller_share_of_the_layers_helps():
    heavy = run_of(pp=2, batch=16, freeze=())
    even, uneven = (
        step_of(heavy, 2),
        step_of(run_of(pp=2, batch=16, freeze=(), num_layers_in_first_pipeline_stage=1), 2),
    )
    assert even.slowest == 0
    assert even.imbalance > 0
    assert uneven.stages[0] < even.stages[0]
    assert uneven.stages[1] > even.stages[1]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_gradients_are_exchanged_and_overlap_hides_some(overlap, sharded):
    def spent(**parallel):
        return step_of(run_of(use_distributed_optimizer=sharded, **parallel), 4).spent["data_parallel"]

    assert spent() > 0
    if overlap:
        assert spent(overlap_grad_reduce=True) <= spent()
        if sharded:
            both = spent(overlap_grad_reduce=True, overlap_param_gather=True)
            assert both <= spent(overlap_grad_reduce=True)


def test_a_sharded_optimizer_is_updated_faster():
    whole, shared = (
        step_of(run_of(use_distributed_optimizer=sharded), 4).spent["optimizer"] for sharded in (False, True)
    )
    assert shared < whole


@pytest.mark.parametrize("link", ["nvlink", "infiniband"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_more_bandwidth_is_never_slower(link, tp, pp):
    config = run_of(tp=tp, pp=pp, batch=16, overlap_grad_reduce=True, overlap_param_gather=True)
    slow, fast = (step_of(config, 16, **{link: speed}).seconds for speed in (1e9, 1e11))
    assert fast <= slow


def test_utilisation_is_useful_work_over_the_peak():
    step = step_of(run_of(), 1)
    assert 0 < step.mfu < 1
    assert step.seconds == pytest.approx(sum(step.spent.values()))
