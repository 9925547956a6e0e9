import json
import logging

import numpy as np
import pytest
import torch

from megatron_vlm.config import NumericError
from megatron_vlm.data.samples import ImageSegment
from megatron_vlm.parallel.groups import seed_everything
from megatron_vlm.training.gradients import seed_of_step
from megatron_vlm.training.step import train_step
from tests.support.blended_runs import open_run, spoil_losses
from tests.support.jobs import CPU
from tests.support.overlap import OVERLAP

FOLDER = "not_finite"


def step(state, blend, iteration=0):
    state.iteration = iteration
    loaders = blend.start_loaders(state, CPU, iteration)
    return train_step(state, loaders, device=CPU, stop_requested=True, blend=blend)


def test_a_transient_fault_changes_nothing_but_leaves_a_note(one_rank, shards, tmp_path, caplog):
    state, blend = open_run(shards, tmp_path / "expected")
    expected = step(state, blend)
    weights = {name: value.clone() for name, value in state.chunks[0].named_parameters()}
    state, blend = open_run(shards, tmp_path / "run")
    spoil_losses(state, times=1)
    with caplog.at_level(logging.WARNING):
        metrics = step(state, blend)
    for name in ("loss", "grad_norm", "dataset_losses", "sample_ids_sha", "stop_requested", "num_tokens"):
        assert getattr(metrics, name) == getattr(expected, name)
    assert all(torch.equal(weights[name], value) for name, value in state.chunks[0].named_parameters())
    assert "a transient fault; the run goes on" in caplog.text
    record = json.loads((tmp_path / "run" / FOLDER / "iteration_0000001.json").read_text())
    assert record["is_transient"]
    assert record["first"]["loss"] == "nan"
    assert float(record["second"]["loss"]) == expected.loss


def test_a_lasting_fault_leaves_samples_and_random_state_and_ends_the_run(one_rank, shards, tmp_path):
    state, blend = open_run(shards, tmp_path)
    with torch.no_grad():
        state.chunks[0].vision_projection.encoder.linear_fc1.weight.fill_(float("nan"))
    before = {name: value.clone() for name, value in state.chunks[0].named_parameters()}
    with pytest.raises(NumericError, match=r"loss is nan at iteration 3, also when computed again, in \d+ samples"):
        step(state, blend, iteration=2)
    after = dict(state.chunks[0].named_parameters())
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)
    record = json.loads((tmp_path / FOLDER / "iteration_0000003.json").read_text())
    assert not record["is_transient"]
    assert [sample["sample_id"] for sample in record["samples"]] == blend.plan.sample_ids(2).tolist()
    has_images = {
        f"{dataset.describe(index)}": any(isinstance(part, ImageSegment) for part in dataset[index].segments)
        for dataset in blend.datasets
        for index in range(len(dataset))
    }
    # Only samples with images meet the damaged weight.
    assert {sample["where"]: sample["loss"] == "nan" for sample in record["samples"]} == {
        sample["where"]: has_images[sample["where"]] for sample in record["samples"]
    }
    saved = np.load(tmp_path / FOLDER / "iteration_0000003_rank_00000.npz")
    assert saved["seed"] == seed_of_step(state.config.training.seed, 2, state.rank)
    seed_everything(int(saved["seed"]))
    assert np.array_equal(saved["torch"], torch.get_rng_state().numpy())


def test_a_record_that_cannot_be_written_does_not_hide_the_fault(one_rank, shards, tmp_path, caplog):
    state, blend = open_run(shards, tmp_path)
    (tmp_path / FOLDER).write_text("a file")
    spoil_losses(state, times=1000)
    with pytest.raises(NumericError, match="loss is nan at iteration 1, also when computed again"):
        step(state, blend)
    assert "cannot be written" in caplog.text


@pytest.mark.distributed
def test_a_fault_of_one_rank_is_computed_again_by_all(workers, shards, tmp_path):
    found = []
    for name, faulty_rank in (("whole", None), ("faulty", 1)):
        run_dir = tmp_path / name
        settings = {"shards": str(shards), "run_dir": str(run_dir), "faulty_rank": faulty_rank, "parallel": OVERLAP}
        found.append(workers.run("tests.support.blended_runs:step_after_a_fault", 2, **settings))
        assert (run_dir / FOLDER).exists() == (name == "faulty")
    assert found[0] == found[1]
