import dataclasses
from pathlib import Path

import pytest

from megatron_vlm.config import TrainConfig, derive_layout, load_config
from megatron_vlm.costs import layouts
from megatron_vlm.costs.cluster import Cluster
from megatron_vlm.costs.layouts import LeftOut, RankedLayout, rank_layouts
from megatron_vlm.platform.gpus import GPUS
from tests.support.configs import tiny_model, tiny_run

A100 = Cluster(gpu_name="A100")
PRETRAIN = Path(__file__).parents[2] / "examples" / "vila_7b" / "pretrain.yaml"


def run_of(batch=8, freeze=(), **language):
    return tiny_run(model=tiny_model(**language), training={"global_batch_size": batch, "freeze": freeze})


def rank(config, world_size=4, cluster=A100, **arguments):
    return rank_layouts(config, world_size, cluster, backend="torch", **arguments)


@pytest.fixture
def small_gpu(monkeypatch):
    """Return a cluster whose GPUs hold so many bytes beside the libraries."""
    monkeypatch.setattr("megatron_vlm.costs.memory.LIBRARIES", 0)

    def make(memory):
        monkeypatch.setitem(GPUS, "A100", dataclasses.replace(GPUS["A100"], memory=memory))
        return A100

    return make


def test_layouts_are_ranked_by_the_time_of_a_step():
    ranking = rank(run_of())
    seconds = [one.step.seconds for one in ranking.fits]
    assert seconds == sorted(seconds)
    assert len(seconds) > 5


def test_every_ranked_layout_is_one_that_the_job_can_have():
    config = run_of()
    for one in rank(config).fits:
        derived = derive_layout(layouts._with(config, one.settings), 4)
        assert derived == one.layout


def test_a_layout_that_does_not_fit_is_never_ranked_and_says_what_it_needs(small_gpu):
    everything = rank(run_of(), cluster=small_gpu(10**12))
    median = sorted(one.memory for one in everything.fits)[len(everything.fits) // 2]
    some = rank(run_of(), cluster=small_gpu(median))
    assert some.fits
    assert all(one.memory <= median for one in some.fits)
    too_large = [one for one in some.left_out if one.memory]
    assert too_large
    assert all(one.memory > median and one.reason.startswith("needs ") for one in too_large)


def test_recomputation_is_chosen_only_where_memory_is_short(small_gpu):
    everything = rank(run_of(), cluster=small_gpu(10**12))
    assert all(one.settings["training.recompute"] == "none" for one in everything.fits)
    short = rank(run_of(), cluster=small_gpu(min(one.memory for one in everything.fits) - 1))
    assert {one.settings["training.recompute"] for one in short.fits} == {"full"}


def test_a_batch_that_does_not_divide_is_left_out_with_the_nearest_that_does():
    out = rank(run_of(batch=6)).left_out
    (found,) = {
        one.fix
        for one in out
        if one.settings["parallel.tensor_model_parallel_size"] == 1
        and one.settings["parallel.pipeline_model_parallel_size"] == 1
        and one.settings["training.micro_batch_size"] == 1
    }
    assert found.startswith("choose 8,")


@pytest.mark.parametrize(("freeze", "expected"), [("[vision_model]", {None}), ("[]", {14, 15})])
def test_fewer_layers_stand_beside_a_tower_that_tips_the_balance(freeze, expected):
    config = load_config(TrainConfig, PRETRAIN, ["model.vision.num_layers=28", f"training.freeze={freeze}"])
    names = ("parallel.num_layers_in_first_pipeline_stage", "parallel.virtual_pipeline_model_parallel_size")
    chosen = {
        tuple(one.settings[name] for name in names)
        for one in rank(config, 16).fits
        if one.settings["parallel.pipeline_model_parallel_size"] == 2
    }
    assert {split for split, chunks in chosen if chunks is None} <= expected


def test_the_layout_of_the_settings_is_predicted_too():
    given = rank(run_of()).given
    assert isinstance(given, RankedLayout)
    assert given.settings["parallel.tensor_model_parallel_size"] == 1
    assert isinstance(rank(run_of(batch=6)).given, LeftOut)


def test_the_simplest_of_equally_fast_layouts_is_suggested():
    ranking = rank(run_of())
    suggested = ranking.suggested
    assert suggested.step.seconds <= (1 + layouts.TIE) * ranking.fits[0].step.seconds
    for one in ranking.fits:
        if one.step.seconds <= (1 + layouts.TIE) * ranking.fits[0].step.seconds:
            assert suggested.complexity <= one.complexity


def test_nothing_is_suggested_where_nothing_fits(small_gpu):
    ranking = rank(run_of(), cluster=small_gpu(1))
    assert ranking.fits == ()
    assert ranking.suggested is None
    assert ranking.left_out


def test_tensor_parallelism_stays_inside_a_node():
    inside = rank(run_of(), cluster=dataclasses.replace(A100, gpus_per_node=2))
    sizes = {one.settings["parallel.tensor_model_parallel_size"] for one in (*inside.fits, *inside.left_out)}
    assert sizes == {1, 2}
    both = {
        one.settings["parallel.tensor_model_parallel_size"] * one.settings["parallel.context_parallel_size"]
        for one in (*inside.fits, *inside.left_out)
    }
    assert both == {1, 2}


def test_context_parallelism_helps_where_rows_are_too_long_for_a_rank(small_gpu):
    everything = rank(run_of(batch=2), world_size=2, cluster=small_gpu(10**12))
    plain = {"parallel.tensor_model_parallel_size": 1, "parallel.pipeline_model_parallel_size": 1}
    alone = [one for one in everything.fits if plain.items() <= one.settings.items()]
    memory = {one.settings["parallel.context_parallel_size"]: one.memory for one in alone}
    assert memory[2] < memory[1]
    assert any(
        one.settings["parallel.context_parallel_size"] == 2
        for one in rank(run_of(batch=2), world_size=2, cluster=small_gpu(memory[1] - 1)).fits
    )


def test_the_context_parallel_size_of_the_settings_is_tried_beyond_a_node():
    config = tiny_run(parallel={"context_parallel_size": 4}, training={"global_batch_size": 8})
    ranking = rank(config, cluster=dataclasses.replace(A100, gpus_per_node=2))
    assert 4 in {one.settings["parallel.context_parallel_size"] for one in ranking.fits}
