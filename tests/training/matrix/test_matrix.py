"""Every layout computes what one process computes, and a run goes on at any other layout."""

import pytest

from tests.support.configs import SEQ_LENGTH
from tests.support.matrix import (
    LAYOUTS,
    MAX_IMAGES,
    NUM_PROCESSES,
    NUM_SAMPLES,
    NUM_STEPS,
    ROWS_PER_STEP,
    Layout,
    Runs,
    largest_difference,
    one_process,
    rows_of,
)
from tests.support.pool import WorkerPool
from tests.support.samples import make_samples, sample_length

pytestmark = [pytest.mark.distributed, pytest.mark.matrix]

# float32: every layout adds the same numbers up in another order; 1e-5 is the bar of the project.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    pool = WorkerPool(NUM_PROCESSES)
    yield Runs(pool, tmp_path_factory.mktemp("matrix"))
    pool.close()


def before(name):
    """The layout before this one of the same variant; the last one for the first."""
    alike = [other for other in LAYOUTS if Layout.named(other).variant == Layout.named(name).variant]
    return alike[alike.index(name) - 1]


def test_matrix_holds_what_it_must():
    assert len(LAYOUTS) == len(set(LAYOUTS)) >= 40
    layouts = [Layout.named(name) for name in LAYOUTS]
    assert max(layout.world_size for layout in layouts) == NUM_PROCESSES
    lengths = [sample_length(placed.sample, 16) for placed in make_samples(NUM_SAMPLES, max_images=MAX_IMAGES)]
    rows = rows_of(NUM_STEPS)
    used = [lengths[sample] for row in rows for sample in row]
    assert max(used) > SEQ_LENGTH // 2  # more than a rank's share with two context-parallel ranks
    for step in range(NUM_STEPS):
        mine = rows[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP]
        assert [] in mine
        assert any(row and all(lengths[sample] < 16 for sample in row) for row in mine)
        assert any(len(row) > 1 for row in mine)


@pytest.mark.parametrize("name", LAYOUTS)
def test_five_steps_equal_those_of_one_process(runs, name):
    reference, steps = runs.reference(Layout.named(name).variant), runs.trained(name)
    assert steps.sample_ids_shas == reference.sample_ids_shas[:NUM_STEPS]
    assert steps.losses == pytest.approx(reference.losses[:NUM_STEPS], rel=TOLERANCE)
    assert steps.grad_norms == pytest.approx(reference.grad_norms[:NUM_STEPS], rel=TOLERANCE)
    difference, parameter = largest_difference(runs.path(name), runs.path(one_process(Layout.named(name).variant)))
    assert difference <= TOLERANCE, parameter


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_of_the_layout_before_goes_on(runs, name):
    reference, saved = runs.reference(Layout.named(name).variant), before(name)
    runs.trained(saved)
    steps = runs.steps(name, num_steps=len(reference.losses) - NUM_STEPS, run_dir=runs.path(saved))
    assert steps.sample_ids_shas == reference.sample_ids_shas[NUM_STEPS:]
    assert steps.losses == pytest.approx(reference.losses[NUM_STEPS:], rel=TOLERANCE)
    assert steps.grad_norms == pytest.approx(reference.grad_norms[NUM_STEPS:], rel=TOLERANCE)
