"""An iteration computed once more has the numbers that the run recorded, and the run's folder stays as it is."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from megatron_vlm.config import UsageError
from megatron_vlm.training.replay import Replay, run_replay
from tests.support.runs import read_metrics, shard_run

pytestmark = pytest.mark.distributed


def config_of(shards, run_dir, **parallel):
    return shard_run(
        shards,
        run_dir,
        data={"num_workers": 0},
        parallel=parallel,
        training={"train_iters": 4},
        checkpoint={"save_interval": 2, "keep_last": 0},
    )


@pytest.fixture(scope="module")
def finished(workers, shards, tmp_path_factory):
    """The folder of a run of 4 iterations with checkpoints of 2 and 4."""
    run_dir = tmp_path_factory.mktemp("finished")
    workers.run("megatron_vlm.training.run:run_training", 2, config=config_of(shards, run_dir, context_parallel_size=2))
    return run_dir


def replay(workers, world_size, config, **settings):
    answers = workers.run(
        "megatron_vlm.training.replay:run_replay", world_size, config=config, replay=Replay(**settings)
    )
    assert all(answer.samples == answers[0].samples for answer in answers)
    return answers[0]


def test_an_iteration_has_the_recorded_numbers_and_a_loss_for_each_sample(workers, shards, finished):
    config = config_of(shards, finished, context_parallel_size=2)
    before = {path: path.stat().st_mtime_ns for path in Path(finished).rglob("*") if path.is_file()}
    again = replay(workers, 2, config, iteration=4)  # iteration 3 is repeated from the checkpoint of 2
    recorded = read_metrics(finished)[3]
    assert again.compared == ", as recorded"
    assert again.grad_norm == recorded["grad_norm"]
    labels = sum(sample.num_labels for sample in again.samples)
    assert labels == recorded["labels"]
    mean = sum((sample.loss or 0.0) * sample.num_labels for sample in again.samples) / labels
    assert mean == pytest.approx(recorded["loss"], rel=1e-9)
    assert {path: path.stat().st_mtime_ns for path in Path(finished).rglob("*") if path.is_file()} == before

    # One rank, which has all positions, gives each sample the same loss.
    alone = replay(workers, 1, config_of(shards, finished), iteration=4)
    assert [sample.sample_id for sample in alone.samples] == [sample.sample_id for sample in again.samples]
    for one, two in zip(alone.samples, again.samples, strict=True):
        assert one.num_labels == two.num_labels
        assert one.loss == pytest.approx(two.loss, rel=1e-5)  # float32, added up in another order

    # Other weights give other losses of the same samples, and nothing is compared.
    later = replay(workers, 1, config_of(shards, finished), iteration=4, checkpoint=str(finished))
    assert [sample.sample_id for sample in later.samples] == [sample.sample_id for sample in again.samples]
    assert later.loss != again.loss
    assert later.compared == ""


def test_a_folder_without_a_run_is_refused_and_not_made(one_rank, shards, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_vlm.training.replay.started_rank", lambda config: nullcontext((None, None)))
    with pytest.raises(UsageError, match="run_dir holds no run: it has no config.yaml"):
        run_replay(config_of(shards, tmp_path / "none"), Replay(iteration=1))
    assert not (tmp_path / "none").exists()
