"""LoRA computes and learns the same at every layout: pairs are drawn, split, summed and saved right."""

import dataclasses
import shutil

import pytest
import torch

from megatron_vlm.checkpoint.folder import find_checkpoint
from megatron_vlm.checkpoint.tensors import list_tensors, read_tensor
from tests.support.configs import tiny_run
from tests.support.lora_runs import NUM_SAMPLES, ROWS, lora_model, lora_run
from tests.support.overlap import OVERLAP

pytestmark = pytest.mark.distributed
# float32: another layout adds the same numbers up in another order.
TOLERANCE = 1e-5
TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "tp2": (2, TP2),
    "tp2_pp2_sp": (4, {**TP2_SP, **PP2}),
    "pp2_vpp2": (2, {**PP2, "virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True}),
    "dp2_buckets": (2, OVERLAP),
    "tp2_sp_dp2_plain_optimizer": (4, {**TP2_SP, "use_distributed_optimizer": False}),
}


def steps(workers, config, world_size, num_steps, save=True):
    return workers.run(
        "tests.support.jobs:train_steps",
        world_size,
        config=config,
        rows=ROWS,
        num_samples=NUM_SAMPLES,
        num_steps=num_steps,
        save=save,
    )[-1]


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["untied", "tied"])
def reference(request, workers, tmp_path_factory):
    """Folder, model and steps of a run of one rank, saved after its third step."""
    folder = tmp_path_factory.mktemp("lora")
    model = lora_model(share_embeddings_and_output_weights=request.param)
    base = tiny_run(str(folder / "base"), model=dataclasses.replace(model, adapter=None))
    workers.run("tests.support.jobs:save_initial", 1, config=base)
    return folder, model, steps(workers, lora_run(folder / "one", folder / "base", model=model), 1, 3)


def assert_same_weights(run, expected):
    ours, theirs = (find_checkpoint(folder) for folder in (run, expected))
    assert list_tensors(ours) == list_tensors(theirs)
    for key in list_tensors(ours):
        if ".lora." in key or "projection" in key:
            torch.testing.assert_close(read_tensor(ours, key), read_tensor(theirs, key), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_at_any_layout_is_that_of_one_rank(workers, reference, layout):
    (folder, model, expected), (world_size, parallel) = reference, LAYOUTS[layout]
    found = steps(workers, lora_run(folder / layout, folder / "base", model=model, parallel=parallel), world_size, 3)
    assert found.losses == pytest.approx(expected.losses, rel=TOLERANCE)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=TOLERANCE)
    assert_same_weights(folder / layout, folder / "one")


@pytest.mark.parametrize(("saved", "resumed"), [("one", "tp2_pp2_sp"), ("tp2_pp2_sp", "one")])
def test_a_checkpoint_goes_on_at_another_layout(workers, reference, tmp_path, saved, resumed):
    folder, model, _ = reference
    if not (folder / saved).exists():
        world_size, parallel = LAYOUTS[saved]
        steps(workers, lora_run(folder / saved, folder / "base", model=model, parallel=parallel), world_size, 3)
    shutil.copytree(folder / saved, tmp_path / "run")
    shutil.copytree(folder / saved, tmp_path / "same")
    losses = []
    for name, layout in (("run", resumed), ("same", saved)):
        world_size, parallel = LAYOUTS.get(layout, (1, None))
        config = lora_run(tmp_path / name, folder / "base", model=model, parallel=parallel)
        losses.append(steps(workers, config, world_size, 1, save=False).losses)
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)


@pytest.mark.parametrize("parallel", [TP2, TP2_SP], ids=["tp2", "tp2_sp"])
def test_gradients_of_all_pairs_are_those_of_one_rank(workers, reference, tmp_path, parallel):
    folder, model, _ = reference
    shutil.copytree(folder / "one", tmp_path / "one")
    shutil.copytree(folder / "one", tmp_path / "two")
    one, two = (
        workers.run(
            "tests.support.lora_jobs:gradient_norms",
            size,
            config=lora_run(tmp_path / name, folder / "base", model=model, parallel=layout),
            rows=ROWS[:4],
            num_samples=NUM_SAMPLES,
        )[0]
        for name, size, layout in (("one", 1, None), ("two", 2, parallel))
    )
    assert len([name for name in one if ".lora." in name]) == 4 * 4 * 2
    assert two == pytest.approx(one, rel=1e-4)
