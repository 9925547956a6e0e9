"""The validation loss is the same at every layout and does not affect the training."""

import dataclasses

import psutil
import pytest
import torch

from megatron_vlm.config import BlendEntry
from megatron_vlm.parallel.groups import rank_layout
from megatron_vlm.training.blend import open_training_blend, open_validation_blend
from megatron_vlm.training.hooks import validation
from megatron_vlm.training.objective import run_model
from megatron_vlm.training.setup import build_state
from megatron_vlm.training.state import SIGNALLED
from megatron_vlm.training.validation import validation_losses
from tests.support.configs import tiny_run
from tests.support.jobs import CPU
from tests.support.overlap import OVERLAP
from tests.support.runs import read_metrics, shard_run
from tests.support.states import METRICS

NAMES = {"validation_loss", "validation_loss/coyo", "validation_loss/mmc4"}
# float32: every layout adds the same numbers up in another order.
TOLERANCE = 1e-5
LAYOUTS = {
    "dp2": (2, {}),
    "dp2_overlap": (2, OVERLAP),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2_virtual2": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "overlap_p2p_comm": True,
        },
    ),
}


@pytest.fixture(scope="module")
def initial(workers, tmp_path_factory):
    """A checkpoint of random weights, written by one rank."""
    run_dir = str(tmp_path_factory.mktemp("initial"))
    workers.run("tests.support.jobs:save_initial", 1, config=tiny_run(run_dir))
    return run_dir


def validated_run(shards, run_dir, *, interval=2, iters=None, data=None, checkpoint=None, **run):
    blend = tuple(BlendEntry(path=str(shards / name)) for name in ("coyo", "mmc4"))
    training = {"validation_interval": interval, "validation_iters": iters, **run.pop("training", {})}
    return shard_run(
        shards, run_dir, data={"validation": blend, **(data or {})}, checkpoint=checkpoint, training=training, **run
    )


def without_validation(config):
    return dataclasses.replace(
        config,
        run_dir=f"{config.run_dir}_without",
        data=dataclasses.replace(config.data, validation=()),
        training=dataclasses.replace(config.training, validation_interval=None, validation_iters=None),
    )


def run(workers, config, world_size):
    assert workers.run("megatron_vlm.training.run:run_training", world_size, config=config) == [None] * world_size
    return read_metrics(config.run_dir)


@pytest.fixture(scope="module")
def reference(workers, shards, initial, tmp_path_factory):
    """The metrics of one rank that validates after iterations 2 and 3, the last one."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    config = validated_run(shards, run_dir, training={"train_iters": 3}, checkpoint={"load_weights": initial})
    return run(workers, config, 1)


@pytest.mark.distributed
def test_validation_comes_at_its_interval_and_at_the_end(reference):
    assert [NAMES <= line.keys() for line in reference] == [False, True, True]
    assert [NAMES & line.keys() for line in reference][0] == set()


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_validation_loss_is_that_of_one_rank_and_training_goes_on_as_without(
    workers, shards, initial, reference, tmp_path, name
):
    world_size, parallel = LAYOUTS[name]
    config = validated_run(
        shards,
        tmp_path / "run",
        parallel=parallel,
        training={"train_iters": 3},
        checkpoint={"load_weights": initial},
    )
    lines = run(workers, config, world_size)
    for line, expected in zip(lines[1:], reference[1:], strict=True):
        assert {key: line[key] for key in NAMES} == pytest.approx({key: expected[key] for key in NAMES}, rel=TOLERANCE)
    plain = run(workers, without_validation(config), world_size)
    for key in ("loss_hex", "grad_norm_hex", "sample_ids_sha"):
        assert [line[key] for line in lines] == [line[key] for line in plain]


@pytest.mark.distributed
def test_a_resumed_run_validates_on_the_same_batches(workers, shards, tmp_path):
    whole = run(workers, validated_run(shards, tmp_path / "whole", training={"train_iters": 4}), 1)
    config = validated_run(shards, tmp_path / "parts", training={"train_iters": 4, "exit_iteration": 3})
    assert workers.run("megatron_vlm.training.run:run_training", 1, config=config) == ["exit_iteration"]
    parts = run(workers, validated_run(shards, tmp_path / "parts", training={"train_iters": 4}), 1)
    for name in NAMES:
        assert [line.get(name) for line in parts] == [line.get(name) for line in whole]


@pytest.fixture
def open_run(one_rank, shards, tmp_path):
    """State and validation blend of a run on one rank, in this process."""

    def build(**settings):
        config = validated_run(shards, tmp_path / "run", **settings)
        blend = open_training_blend(config)
        return build_state(config, rank_layout(), blend.plan, blend.dataset_names), open_validation_blend(config)

    return build


def measure(state, blend, stop_requested=lambda: False):
    return validation_losses(state, blend, device=CPU, stop_requested=stop_requested)


def test_loss_is_the_mean_over_the_labels_of_every_sample(open_run):
    state, blend = open_run()
    losses, datasets = [], []
    (loader,) = blend.start_loaders(state, CPU, 0)
    for batch in loader:
        with torch.no_grad():
            output = run_model(state.chunks[0], batch)
        losses += output.flatten().tolist()
        datasets += batch.label_datasets.tolist()
    loader.close()
    expected = {"validation_loss": sum(losses) / len(losses)}
    for index, name in enumerate(("coyo", "mmc4")):
        mine = [loss for loss, dataset in zip(losses, datasets, strict=True) if dataset == index]
        expected[f"validation_loss/{name}"] = sum(mine) / len(mine)
    assert measure(state, blend) == pytest.approx(expected, rel=1e-6)


def test_batches_do_not_depend_on_the_seed_of_the_training(open_run):
    plans = [open_run(training={"seed": seed})[1].plan.hash for seed in (1, 2)]
    assert plans[0] == plans[1]


def test_number_of_batches_can_be_given(open_run):
    assert open_run()[1].plan.summary.num_passes == 1
    assert open_run(iters=2)[1].plan.num_iterations == 2


def test_nothing_of_the_training_changes(open_run):
    state, blend = open_run()
    state.wrapped[0].train()
    state.chunks[0].vision_model.eval()
    before = torch.get_rng_state(), [module.training for module in state.chunks[0].modules()]
    assert measure(state, blend) == measure(state, blend)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert [module.training for module in state.chunks[0].modules()] == before[1]
    assert all(parameter.main_grad.eq(0).all() for parameter in state.chunks[0].parameters())


def test_no_process_is_left_by_a_validation(open_run):
    state, blend = open_run()
    before = psutil.Process().children(recursive=True)
    measure(state, blend)
    assert psutil.Process().children(recursive=True) == before


def test_a_signal_meanwhile_ends_the_validation_without_a_result_and_then_the_run(open_run):
    state, blend = open_run()
    before = psutil.Process().children(recursive=True)
    asked = []
    hook = validation.Hook(blend, device=CPU, stop_requested=lambda: bool(asked.append(1)) or len(asked) > 2)
    state.iteration = 2
    hook.step(state, METRICS)
    assert (state.validation_losses, state.stop_reason) == ({}, SIGNALLED)
    assert len(asked) == 3 < blend.plan.num_iterations
    assert psutil.Process().children(recursive=True) == before


def test_a_run_that_was_told_to_stop_does_not_validate(open_run):
    state, blend = open_run()
    state.iteration = 2
    hook = validation.Hook(blend, device=CPU)
    hook.step(state, dataclasses.replace(METRICS, stop_requested=True))
    assert state.validation_losses == {}
