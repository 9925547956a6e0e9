"""Training steps through transformer-engine's modules, their kernels computed by torch, are those of torch modules."""

from dataclasses import replace

import pytest

from tests.support.configs import SEQ_LENGTH, tiny_model, tiny_run
from tests.support.samples import make_samples, pack_in_order, sample_length

pytestmark = pytest.mark.distributed

NUM_SAMPLES, NUM_STEPS = 30, 2
SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {
    "one_rank": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp": (2, SP),
    "tp2_pp2_sp": (4, {**SP, "pipeline_model_parallel_size": 2}),
}
# float32; the same numbers are added up in another order.
TOLERANCE = 1e-5


def rows():
    lengths = [sample_length(placed.sample, 16) for placed in make_samples(NUM_SAMPLES)]
    packed = pack_in_order(lengths, SEQ_LENGTH)[: 4 * NUM_STEPS]
    return packed + [[] for _ in range(4 * NUM_STEPS - len(packed))]


def steps(workers, backend, adam, layout, folder, **training):
    world_size, parallel = LAYOUTS[layout]
    return workers.run(
        "tests.transformer_engine.jobs:train",
        world_size,
        adam=adam,
        config=tiny_run(
            str(folder), parallel=parallel, model=replace(tiny_model(), backend=backend), training=training
        ),
        rows=rows(),
        num_samples=NUM_SAMPLES,
        num_steps=NUM_STEPS,
    )[-1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_losses_and_gradient_norms_are_those_of_torch_modules(te_workers, layout, recompute, tmp_path):
    theirs = steps(te_workers, "transformer_engine", "FusedAdam", layout, tmp_path / "te", recompute=recompute)
    ours = steps(te_workers, "torch", "AdamW", layout, tmp_path / "torch", recompute=recompute)
    assert theirs.losses == pytest.approx(ours.losses, rel=TOLERANCE)
    assert theirs.grad_norms == pytest.approx(ours.grad_norms, rel=TOLERANCE)
