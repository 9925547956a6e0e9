"""What learns, and how fast, by pattern: the same at every layout, also where a rank learns nothing, and resumed."""

import dataclasses

import pytest

from tests.support.configs import SEQ_LENGTH, tiny_run
from tests.support.jobs import starting_from
from tests.support.overlap import OVERLAP
from tests.support.samples import make_samples, pack_in_order, sample_length

pytestmark = pytest.mark.distributed

NUM_SAMPLES, NUM_STEPS, ROWS_PER_STEP = 84, 4, 4
# float32: sums in another order.
TOLERANCE = 1e-5
LAYERS = "language_model.decoder.layers"
RUNS = {
    # With two stages, the last learns nothing.
    "align": {"training": {"freeze": ("vision_model", "language_model")}},
    # The first learns nothing, and the first layer of the second does not either.
    "last_layer": {
        "training": {"freeze": ("vision_*", "language_model.embedding", f"{LAYERS}.[0-2].*"), "recompute": "full"}
    },
    "rates": {
        "training": {"freeze": (f"{LAYERS}.1",)},
        "optimizer": {
            "lr": 1e-2,
            "weight_decay": 0.5,
            "lr_multipliers": {"vision_model": 0.1, f"{LAYERS}.[2-3]": 3.0, "vision_projection": 0.5},
            "no_weight_decay": ("language_model.output_layer",),
        },
    },
}
PP2, VPP2 = {"pipeline_model_parallel_size": 2}, {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True}
LAYOUTS = {
    "one": (1, {}),
    "pp2": (2, PP2),
    "vpp2": (2, {**PP2, **VPP2}),
    "pp2_plain": (2, {**PP2, "use_distributed_optimizer": False}),
    "pp2_dp2": (4, {**PP2, **OVERLAP}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}


def rows():
    packed = pack_in_order([sample_length(placed.sample, 16) for placed in make_samples(NUM_SAMPLES)], SEQ_LENGTH)
    return packed[: NUM_STEPS * ROWS_PER_STEP]


@pytest.fixture(scope="module")
def train(workers, tmp_path_factory):
    """Return a function that does steps of a run at a layout from one set of weights, or resumes it."""
    initial = str(tmp_path_factory.mktemp("initial"))
    workers.run("tests.support.jobs:save_initial", 1, config=tiny_run(initial))

    def run(name, layout, num_steps, run_dir="unused", save=False):
        world_size, parallel = LAYOUTS[layout]
        settings = {part: dict(values) for part, values in RUNS[name].items()}
        config = tiny_run(str(run_dir), parallel=parallel, **settings)
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, train_iters=NUM_STEPS))
        answers = workers.run(
            "tests.support.jobs:train_steps",
            world_size,
            config=starting_from(config, initial),
            rows=rows(),
            num_samples=NUM_SAMPLES,
            num_steps=num_steps,
            save=save,
        )
        return answers[0]

    return run


@pytest.fixture(scope="module")
def reference(train):
    """Return the whole run on one rank, by name."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = train(name, "one", NUM_STEPS)
        return found[name]

    return of


def assert_same(steps, reference):
    assert steps.losses == pytest.approx(reference.losses, rel=TOLERANCE)
    assert steps.grad_norms == pytest.approx(reference.grad_norms, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("align", "pp2", "pp2_dp2"),
        ("align", "pp2_dp2", "pp2_dp2"),
        ("align", "pp2_plain", "pp2_plain"),
        ("last_layer", "pp2_dp2", "one"),
        ("last_layer", "vpp2", "pp2"),
        ("rates", "pp2_dp2", "tp2_sp"),
    ],
)
def test_a_run_resumed_at_another_layout_equals_one_rank(train, reference, name, first, second, tmp_path):
    whole = reference(name)
    assert len(set(whole.losses)) == NUM_STEPS
    begun = train(name, first, 2, tmp_path, save=True)
    resumed = train(name, second, 2, tmp_path)
    assert_same(
        dataclasses.replace(
            begun, losses=begun.losses + resumed.losses, grad_norms=begun.grad_norms + resumed.grad_norms
        ),
        whole,
    )


def test_a_run_with_rates_by_pattern_is_resumed_to_the_bit(train, reference, tmp_path):
    train("rates", "one", 2, tmp_path, save=True)
    resumed = train("rates", "one", 2, tmp_path)
    assert (resumed.losses, resumed.grad_norms) == (reference("rates").losses[2:], reference("rates").grad_norms[2:])
