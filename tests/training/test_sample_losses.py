import pytest
import torch

from megatron_vlm.data.loading.collate import Collation, collate
from megatron_vlm.data.loading.reader import SampleReader
from megatron_vlm.parallel.slicing import ImageShare
from megatron_vlm.training.objective import run_model
from megatron_vlm.training.sample_losses import losses_by_sample
from megatron_vlm.training.step import train_step
from tests.support.blended_runs import open_run
from tests.support.jobs import CPU


def test_losses_are_those_of_each_sample_alone_and_of_the_step_together(one_rank, shards, tmp_path):
    state, blend = open_run(shards, tmp_path)
    state.iteration = 1
    samples, totals = losses_by_sample(state, blend, CPU)
    assert [sample.sample_id for sample in samples] == blend.plan.sample_ids(1).tolist()
    assert {sample.row for sample in samples} == {0, 1}

    collation = Collation.from_config(state.config.model, state.config.data)
    reader = SampleReader(blend.datasets, blend.plan, collation.image_tokens)
    for sample in samples:
        batch = collate([[reader.read(sample.sample_id)]], collation, ImageShare())
        with torch.no_grad():
            output = run_model(state.chunks[0], batch)
        assert sample.num_labels == output.numel()
        assert sample.loss == pytest.approx(output.double().mean().item(), rel=1e-5)  # float32, packed otherwise

    metrics = train_step(state, blend.start_loaders(state, CPU, 1), device=CPU, stop_requested=False)
    assert totals.loss == pytest.approx(metrics.loss, rel=1e-12)
    assert totals.grad_norm == metrics.grad_norm
    assert sum(sample.num_labels for sample in samples) == metrics.num_labels


def test_a_sample_that_stands_in_the_batch_twice_has_one_loss(one_rank, shards, tmp_path):
    state, blend = open_run(shards, tmp_path, training={"global_batch_size": 20, "train_iters": 2})
    samples, totals = losses_by_sample(state, blend, CPU)
    ids = [sample.sample_id for sample in samples]
    assert len(set(ids)) < len(ids)
    assert len(totals.losses) == len(set(ids))
    losses = {sample.sample_id: sample.loss for sample in samples}
    assert [sample.loss for sample in samples] == [losses[sample_id] for sample_id in ids]
