"""A whole run on prepared shards: what it leaves in its folder, and that stopping and going on changes nothing."""

import dataclasses
import shutil

import pytest
import torch

from megatron_vlm.checkpoint.folder import checkpoint_path, list_iterations
from megatron_vlm.config import BlendEntry, ConfigError
from megatron_vlm.config.hooks import profiler
from megatron_vlm.platform.files.events import read_events
from megatron_vlm.training import run as run_module
from tests.support.configs import tiny_model, tiny_run
from tests.support.ledgers import read_ledger
from tests.support.runs import read_metrics, shard_run

pytestmark = pytest.mark.distributed

TP2_PP2_SP = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}


def config_of(shards, run_dir, lr_decay_style="cosine", **training):
    return shard_run(
        shards,
        run_dir,
        parallel=TP2_PP2_SP,
        training=training,
        optimizer={"lr_decay_style": lr_decay_style},
        checkpoint={"save_interval": 4},
    )


def run(workers, config):
    return workers.run("megatron_vlm.training.run:run_training", 4, config=config)


def test_a_run_that_stops_and_goes_on_equals_one_that_does_not(workers, shards, tmp_path):
    assert run(workers, config_of(shards, tmp_path / "whole")) == [None] * 4
    # The ranks have run longer than this: the time is over at the first step of every start.
    in_time = config_of(shards, tmp_path / "parts", exit_duration_minutes=1e-6)
    assert [run(workers, in_time), run(workers, in_time)] == [["signalled"] * 4] * 2
    stopped = config_of(shards, tmp_path / "parts", exit_iteration=3)
    assert run(workers, stopped) == ["exit_iteration"] * 4
    assert [line["iteration"] for line in read_metrics(tmp_path / "parts")] == [1, 2, 3]
    assert run(workers, config_of(shards, tmp_path / "parts")) == [None] * 4

    whole, parts = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts")
    for name in ("iteration", "loss_hex", "grad_norm_hex", "sample_ids_sha", "learning_rate", "tokens", "images"):
        assert [line[name] for line in parts] == [line[name] for line in whole], name
    check_folder(tmp_path / "parts", whole)


def test_a_run_that_goes_on_from_an_asynchronous_save_equals_one_that_does_not(workers, shards, tmp_path):
    config = shard_run(
        shards,
        tmp_path,
        parallel={"overlap_grad_reduce": True, "overlap_param_gather": True},
        checkpoint={"save_interval": 2, "keep_last": 0, "async_save": True},
    )
    workers.run("megatron_vlm.training.run:run_training", 2, config=config)
    whole = read_metrics(tmp_path)
    assert list_iterations(tmp_path) == [6, 4, 2]
    for iteration in (6, 4):  # 2 was written while 3 and 4 were computed
        shutil.rmtree(checkpoint_path(tmp_path, iteration))
    workers.run("megatron_vlm.training.run:run_training", 2, config=config)
    again = read_metrics(tmp_path)
    for name in ("iteration", "loss_hex", "grad_norm_hex", "sample_ids_sha"):
        assert [line[name] for line in again] == [line[name] for line in whole], name


def check_folder(run_dir, lines):
    assert {"config.yaml", "tokenizer.model", "metrics.jsonl", "tensorboard", "checkpoints", "ledger", "plan"} <= {
        path.name for path in run_dir.iterdir()
    }
    assert [path.name for path in (run_dir / "checkpoints").glob("iter_*")] == ["iter_0000006"]
    entries = [entry for entry, _ in read_ledger(run_dir / "ledger")]
    assert [entry.sample_ids_sha for entry in entries] == [line["sample_ids_sha"] for line in lines]
    assert {key for line in lines for key in line if key.startswith("loss/")} == {"loss/coyo", "loss/mmc4"}
    assert all(0 <= line["padding"] < 1 and line["tokens_per_s"] > 0 for line in lines)


def test_a_finished_run_that_is_made_longer_equals_one_that_was_as_long(workers, shards, tmp_path):
    # With a decay, the learning rates would be those of the two lengths.
    for train_iters in (4, 7):
        assert run(workers, config_of(shards, tmp_path / "parts", "constant", train_iters=train_iters)) == [None] * 4
    assert run(workers, config_of(shards, tmp_path / "whole", "constant", train_iters=7)) == [None] * 4
    whole, parts = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts")
    for name in ("iteration", "loss_hex", "grad_norm_hex", "sample_ids_sha", "consumed_samples"):
        assert [line[name] for line in parts] == [line[name] for line in whole], name
    entries = [
        [entry.sample_ids_sha for entry, _ in read_ledger(tmp_path / name / "ledger")] for name in ("whole", "parts")
    ]
    assert entries[0] == entries[1]


def test_a_blend_that_changes_goes_on_bit_equal_from_before_at_and_after_the_change(workers, shards, tmp_path):
    def config_with(run_dir, *begins, exit_iteration=None):
        later = tuple(BlendEntry(path=str(shards / "mmc4"), from_iteration=begin) for begin in begins)
        config = shard_run(shards, tmp_path / run_dir, training={"train_iters": 6, "exit_iteration": exit_iteration})
        return dataclasses.replace(config, data=dataclasses.replace(config.data, blend=config.data.blend + later))

    def train(config):
        return workers.run("megatron_vlm.training.run:run_training", 2, config=config)

    assert train(config_with("whole", 4)) == [None] * 2
    # The change is added to a run that has begun; the stops are before it, at it and after it.
    assert train(config_with("parts", exit_iteration=1)) == ["exit_iteration"] * 2
    for stop in (2, 3, 4):
        assert train(config_with("parts", 4, exit_iteration=stop)) == ["exit_iteration"] * 2
    with pytest.raises(RuntimeError, match=r"ConfigError: .* other samples for the 4 iterations .* from_iteration=5"):
        train(config_with("parts", 3))
    assert train(config_with("parts", 4)) == [None] * 2
    whole, parts = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts")
    for name in ("iteration", "loss_hex", "grad_norm_hex", "sample_ids_sha", "consumed_samples"):
        assert [line[name] for line in parts] == [line[name] for line in whole], name
    consumed = [[ids.tolist() for _, ids in read_ledger(tmp_path / name / "ledger")] for name in ("whole", "parts")]
    assert consumed[0] == consumed[1]
    assert all(min(ids) >= 25 for ids in consumed[0][3:])  # of mmc4


def test_a_refused_resume_leaves_the_folder_as_it_was(workers, shards, tmp_path):
    def start(data=None, model=None, **training):
        config = shard_run(shards, tmp_path / "run", training={"train_iters": 2, **training}, data=data, model=model)
        return workers.run("megatron_vlm.training.run:run_training", 1, config=config)

    def content():
        return {path: path.is_file() and path.read_bytes() for path in (tmp_path / "run").rglob("*")}

    start()
    before = content()
    validated = {"validation": (BlendEntry(path=str(shards / "mmc4")),)}
    with pytest.raises(RuntimeError, match="was trained on data plan"):
        start(validated, seed=5, validation_interval=1)
    assert content() == before
    shutil.rmtree(tmp_path / "run" / "plan")
    with pytest.raises(RuntimeError, match="model.language.rotary_base is 5000"):
        start(model=tiny_model(rotary_base=5000))
    assert not (tmp_path / "run" / "plan").exists()


def test_a_run_that_has_not_begun_keeps_its_plan(workers, shards, tmp_path):
    config = shard_run(shards, tmp_path / "run", checkpoint={"load_weights": str(tmp_path)})
    with pytest.raises(RuntimeError, match="no complete checkpoint found"):
        workers.run("megatron_vlm.training.run:run_training", 1, config=config)
    assert len(list((tmp_path / "run" / "plan").iterdir())) == 1


def test_samples_in_quarantine_have_no_loss_and_stay_in_the_plan(workers, shards, tmp_path):
    assert run(workers, config_of(shards, tmp_path / "whole", train_iters=2)) == [None] * 4
    (_, first), (_, second) = read_ledger(tmp_path / "whole" / "ledger")
    left_out = next(sample for sample in second.tolist() if sample not in first)
    (tmp_path / "bad.txt").write_text(f"{left_out}\n")
    config = config_of(shards, tmp_path / "without", train_iters=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, quarantine=str(tmp_path / "bad.txt")))
    assert run(workers, config) == [None] * 4
    whole, without = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "without")
    assert [line["sample_ids_sha"] for line in without] == [line["sample_ids_sha"] for line in whole]
    assert without[0]["loss_hex"] == whole[0]["loss_hex"]
    assert without[1]["loss_hex"] != whole[1]["loss_hex"]
    assert without[1]["tokens"] < whole[1]["tokens"]
    notes = [event.details for event in read_events(tmp_path / "without")[0] if event.kind == "quarantine"]
    assert (notes[0]["samples"], notes[-1]) == (1, {"left_out": 1})


def test_hooks_of_the_settings_act_in_a_run(workers, shards, tmp_path):
    hooks = (profiler.Config(iterations=(2,), ranks=(0, 3)),)
    assert run(workers, config_of(shards, tmp_path, train_iters=2, hooks=hooks)) == [None] * 4
    traces = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert traces == ["iteration_0000002_rank_00000.json", "iteration_0000002_rank_00003.json"]


def test_deterministic_mode_gives_the_bits_that_the_host_gives_anyway(workers, shards, tmp_path):
    for name, is_deterministic in (("mode", True), ("plain", False)):
        config = config_of(shards, tmp_path / name, train_iters=2, deterministic=is_deterministic)
        assert run(workers, config) == [None] * 4
        assert workers.run("torch:are_deterministic_algorithms_enabled", 4) == [is_deterministic] * 4
    mode, plain = read_metrics(tmp_path / "mode"), read_metrics(tmp_path / "plain")
    for name in ("loss_hex", "grad_norm_hex"):
        assert [line[name] for line in mode] == [line[name] for line in plain], name


def test_rank_asks_its_own_gpu_before_it_joins_the_job(monkeypatch):
    monkeypatch.setattr(run_module, "prepare_process", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match="tensorwise needs GPUs of compute capability 8.9, these have 8.0"):
        run_module.run_training(tiny_run(training={"fp8": "hybrid"}))
