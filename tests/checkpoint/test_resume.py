"""A run that is saved and loaded goes on as if nothing had happened."""

from dataclasses import replace

import pytest

from tests.support.configs import SEQ_LENGTH, tiny_run
from tests.support.overlap import OVERLAP
from tests.support.samples import make_samples, pack_in_order, sample_length

pytestmark = pytest.mark.distributed

NUM_SAMPLES, STEPS_BEFORE, STEPS_AFTER = 126, 2, 3
ROWS_PER_STEP = 6
TP2_PP2_SP = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
# Another layout adds the same numbers up in another order (float32).
TOLERANCE = 1e-5


def rows():
    lengths = [sample_length(placed.sample, 16) for placed in make_samples(NUM_SAMPLES)]
    packed = pack_in_order(lengths, SEQ_LENGTH)
    return packed + [[] for _ in range(ROWS_PER_STEP * (STEPS_BEFORE + STEPS_AFTER) - len(packed))]


def run_of(folder, *, parallel, **training):
    return tiny_run(str(folder), parallel=parallel, training={"global_batch_size": ROWS_PER_STEP, **training})


def steps(workers, config, world_size, num_steps, save=False):
    return workers.run(
        "tests.support.jobs:train_steps",
        world_size,
        config=config,
        rows=rows(),
        num_samples=NUM_SAMPLES,
        num_steps=num_steps,
        save=save,
    )[-1]


LAYOUTS = {
    "one_rank": (1, {}),
    "dp2": (2, {}),
    "dp2_plain_optimizer": (2, {"use_distributed_optimizer": False}),
    "tp2_pp2_sp": (4, TP2_PP2_SP),
    "dp2_overlap": (2, OVERLAP),
    # Buckets are padded to a multiple of the ranks and of 128.
    "dp3_overlap": (3, OVERLAP),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def interrupted(request, workers, tmp_path_factory):
    """The config of a run that was saved after two steps, and the steps that an uninterrupted run does after them."""
    world_size, parallel = LAYOUTS[request.param]
    config = run_of(tmp_path_factory.mktemp(request.param), parallel=parallel)
    whole = steps(workers, replace(config, run_dir=config.run_dir + "_whole"), world_size, STEPS_BEFORE + STEPS_AFTER)
    steps(workers, config, world_size, STEPS_BEFORE, save=True)
    return config, world_size, whole


@pytest.fixture(scope="module")
def resumed(workers, interrupted):
    config, world_size, _ = interrupted
    return steps(workers, config, world_size, STEPS_AFTER)


def test_next_three_steps_are_bit_equal(interrupted, resumed):
    _, _, whole = interrupted
    assert [x.hex() for x in resumed.losses] == [x.hex() for x in whole.losses[STEPS_BEFORE:]]
    assert [x.hex() for x in resumed.grad_norms] == [x.hex() for x in whole.grad_norms[STEPS_BEFORE:]]


def test_every_parameter_counts_its_own_steps(interrupted, resumed):
    _, _, whole = interrupted
    assert resumed.adam_steps == whole.adam_steps == [STEPS_BEFORE + STEPS_AFTER]


@pytest.mark.parametrize("target", ["one_rank", "dp2", "dp2_plain_optimizer", "tp2_pp2_sp"])
def test_another_layout_goes_on_with_the_same_losses(workers, interrupted, target):
    config, _, whole = interrupted
    world_size, parallel = LAYOUTS[target]
    moved = replace(config, parallel=tiny_run(parallel=parallel).parallel)
    resumed = steps(workers, moved, world_size, STEPS_AFTER)
    assert resumed.losses == pytest.approx(whole.losses[STEPS_BEFORE:], rel=TOLERANCE)
    assert resumed.grad_norms == pytest.approx(whole.grad_norms[STEPS_BEFORE:], rel=TOLERANCE)


@pytest.mark.parametrize(("saved", "resumed"), [("cp2", "tp2_pp2_sp"), ("dp3_overlap", "cp2")])
def test_the_size_of_the_context_may_change(workers, tmp_path, saved, resumed):
    layouts = {**LAYOUTS, "cp2": (2, {"context_parallel_size": 2})}
    results = []
    for name, steps_of_run in ((saved, STEPS_BEFORE), (resumed, 1)):
        world_size, parallel = layouts[name]
        config = run_of(tmp_path / "run", parallel=parallel)
        results.append(steps(workers, config, world_size, steps_of_run, save=name == saved))
    whole = steps(workers, run_of(tmp_path / "whole", parallel={}), 1, STEPS_BEFORE + 1)
    for field in ("losses", "grad_norms"):
        found = [*getattr(results[0], field), *getattr(results[1], field)]
        assert found == pytest.approx(getattr(whole, field), rel=TOLERANCE)
    assert [*results[0].sample_ids_shas, *results[1].sample_ids_shas] == whole.sample_ids_shas


def assert_resumes_bit_equal(workers, config, world_size):
    whole = steps(workers, replace(config, run_dir=config.run_dir + "_whole"), world_size, STEPS_BEFORE + STEPS_AFTER)
    steps(workers, config, world_size, STEPS_BEFORE, save=True)
    resumed = steps(workers, config, world_size, STEPS_AFTER)
    assert [x.hex() for x in resumed.losses] == [x.hex() for x in whole.losses[STEPS_BEFORE:]]


@pytest.mark.parametrize("name", ["tp2_pp2_sp", "dp2_overlap", "dp3_overlap"])
def test_bf16_run_resumes_bit_equal(workers, tmp_path, name):
    world_size, parallel = LAYOUTS[name]
    config = run_of(tmp_path / "run", parallel=parallel, precision="bf16")
    assert_resumes_bit_equal(workers, config, world_size)


def test_frozen_parts_resume_bit_equal(workers, tmp_path):
    config = run_of(tmp_path / "run", parallel=TP2_PP2_SP, freeze=("vision_model", "language_model"))
    assert_resumes_bit_equal(workers, config, 4)
