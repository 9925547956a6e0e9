"""A tower of every type is trained alike whole and split, and its checkpoints load in either form."""

import pytest

from tests.support.configs import tiny_run
from tests.support.jobs import starting_from
from tests.support.matrix import MAX_IMAGES, NUM_SAMPLES, ROWS_PER_STEP, largest_difference, rows_of
from tests.support.vision_towers import TINY, tiny_models

pytestmark = [pytest.mark.distributed, pytest.mark.matrix]

# float32: every layout adds the same numbers up in another order; 1e-5 is the bar of the project.
TOLERANCE = 1e-5
NUM_STEPS, STEPS_AFTER = 3, 2
WHOLE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {
    "dp1": (1, {}),
    "tp2": (2, WHOLE),
    "tp2_vtp": (2, {**WHOLE, "vision_tensor_parallel": True}),
    "cp2_tp2_vtp": (4, {**WHOLE, "vision_tensor_parallel": True, "context_parallel_size": 2}),
}
RESUMES = {"dp1": "tp2_vtp", "tp2": "tp2_vtp", "tp2_vtp": "tp2", "cp2_tp2_vtp": "dp1"}


def run_of(model, name, run_dir):
    return tiny_run(
        str(run_dir),
        model=model,
        parallel=LAYOUTS[name][1],
        training={"global_batch_size": ROWS_PER_STEP},
        # Where a gradient is all rounding, as at the biases of keys, Adam would make a whole step of it.
        optimizer={"adam_eps": 1e-5},
    )


@pytest.mark.parametrize("number", range(len(TINY)), ids=[f"{type}{i}" for i, (type, _) in enumerate(TINY)])
def test_a_split_tower_learns_what_a_whole_one_learns(number, workers, tmp_path):
    model = tiny_models()[number]
    image_tokens = model.num_image_tokens(model.vision.image_size, model.vision.image_size)
    settings = {"rows": rows_of(NUM_STEPS + STEPS_AFTER, image_tokens), "num_samples": NUM_SAMPLES}

    def train(name, config, num_steps, **arguments):
        job = "tests.support.jobs:train_steps"
        arguments = {"num_steps": num_steps, "max_images": MAX_IMAGES, "timeout": 1200.0, **arguments}
        return workers.run(job, LAYOUTS[name][0], config=config, **settings, **arguments)[0]

    def alike(found, expected):
        assert found.losses == pytest.approx(expected.losses, rel=TOLERANCE), name
        assert found.grad_norms == pytest.approx(expected.grad_norms, rel=TOLERANCE), name

    workers.run("tests.support.jobs:save_initial", 1, config=run_of(model, "dp1", tmp_path / "start"))
    steps = {}
    for name in LAYOUTS:
        config = starting_from(run_of(model, name, tmp_path / name), str(tmp_path / "start"))
        steps[name] = train(name, config, NUM_STEPS, save=True)
        alike(steps[name], steps["dp1"])
        difference, parameter = largest_difference(tmp_path / name, tmp_path / "dp1")
        assert difference <= TOLERANCE, (name, parameter)
    expected = train("dp1", run_of(model, "dp1", tmp_path / "dp1"), STEPS_AFTER)
    for name, saved in RESUMES.items():
        alike(train(name, run_of(model, name, tmp_path / saved), STEPS_AFTER), expected)
