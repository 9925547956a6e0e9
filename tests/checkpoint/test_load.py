"""What a run starts from: its newest valid checkpoint, another run's weights, or nothing."""

import dataclasses
import logging
import re
import shutil

import pytest
import torch

from megatron_vlm.checkpoint.adam_state import adams, create_state
from megatron_vlm.checkpoint.folder import checkpoint_path, list_iterations
from megatron_vlm.checkpoint.load import resume
from megatron_vlm.checkpoint.manifest import read_manifest, write_manifest
from megatron_vlm.checkpoint.parallel_files import plan_part
from megatron_vlm.checkpoint.save import save_checkpoint
from megatron_vlm.checkpoint.tensors import hash_weights, write_weights
from megatron_vlm.config import CheckpointConfig, CheckpointError, ConfigError, config_to_dict
from megatron_vlm.data.plan.plan import PlanHashes
from tests.support.configs import tiny_model, tiny_run
from tests.support.hostile import replace_file
from tests.support.jobs import FixedPlan, start


@pytest.fixture
def saved(one_rank, tmp_path):
    """A run with checkpoints of iterations 1 and 2."""
    config = dataclasses.replace(tiny_run(str(tmp_path / "run")), checkpoint=CheckpointConfig(keep_last=0))
    save(config, 1, 2)
    return config


def save(config, *iterations):
    state = start(config)
    for iteration in iterations:
        state.iteration = iteration
        save_checkpoint(config, state.chunks, state.optimizer, state.progress())


def save_as_before(config, monkeypatch):
    """Save a checkpoint with what earlier versions saved of the optimizer: what megatron-core itself describes."""
    state = start(config)
    for adam in adams(state.optimizer):
        create_state(adam)

    def plan(described, metadata, stage):
        model = {name: part for name, part in described.items() if name != "optimizer"}
        way = {**metadata, "distrib_optim_sharding_type": "fully_reshardable"}
        optimizer = state.optimizer.sharded_state_dict(model, is_loading=False, metadata=way)
        return plan_part({**model, "optimizer": optimizer}, metadata, stage)

    with monkeypatch.context() as patch:
        patch.setattr("megatron_vlm.checkpoint.save.plan_part", plan)
        save_checkpoint(config, state.chunks, state.optimizer, state.progress())


def damage(config, iteration):
    path = next(checkpoint_path(config.run_dir, iteration).glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_newest_checkpoint_is_resumed(saved):
    assert start(saved).iteration == 2


def test_a_damaged_newest_falls_back_with_one_warning(saved, caplog):
    damage(saved, 2)
    with caplog.at_level(logging.WARNING, logger="megatron_vlm"):
        state = start(saved)
    assert state.iteration == 1
    ((name, fault),) = state.damaged_checkpoints.items()
    assert name == checkpoint_path(saved.run_dir, 2).name
    assert "wrong checksum" in fault
    assert [record.message for record in caplog.records if "wrong checksum" in record.message]
    assert len(caplog.records) == 1


def test_a_newest_without_manifest_falls_back(saved):
    (checkpoint_path(saved.run_dir, 2) / "manifest.json").unlink()
    assert start(saved).iteration == 1


def test_a_file_that_the_manifest_lacks_falls_back(saved):
    (checkpoint_path(saved.run_dir, 2) / "stranger.distcp").write_bytes(b"?")
    assert start(saved).iteration == 1


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json"])
def test_a_damaged_small_file_under_a_right_manifest_falls_back(saved, name):
    replace_file(checkpoint_path(saved.run_dir, 2), name, b"\x80\x04no such thing")
    assert start(saved).iteration == 1


def test_damaged_values_under_a_right_manifest_are_one_line(saved):
    path = checkpoint_path(saved.run_dir, 2)
    for file in path.glob("*.distcp"):
        replace_file(path, file.name, bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match="values cannot be read: .*; fix: use another checkpoint"):
        start(saved)
    with pytest.raises(CheckpointError, match="values cannot be read: "):
        hash_weights(path)


def test_a_run_without_a_valid_checkpoint_never_starts_over(saved):
    for iteration in (1, 2):
        damage(saved, iteration)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is valid"):
        start(saved)


def test_weights_are_those_that_were_saved(saved, tmp_path):
    other = dataclasses.replace(
        saved, run_dir=str(tmp_path / "other"), checkpoint=CheckpointConfig(load_weights=saved.run_dir)
    )
    save(other, 1)
    assert hash_weights(checkpoint_path(other.run_dir, 1)) == hash_weights(checkpoint_path(saved.run_dir, 2))


def test_damaged_weights_are_refused(saved, tmp_path):
    damage(saved, 2)
    other = dataclasses.replace(
        saved, run_dir=str(tmp_path / "other"), checkpoint=CheckpointConfig(load_weights=saved.run_dir)
    )
    with pytest.raises(CheckpointError, match="checkpoint is damaged"):
        start(other)


def test_a_vocabulary_of_another_padding_is_refused_by_tensor(saved, tmp_path, monkeypatch):
    # The settings are the same where another version padded it.
    monkeypatch.setattr("megatron_vlm.checkpoint.load.check_start", lambda checkpoint, model: None)
    other = dataclasses.replace(
        saved,
        run_dir=str(tmp_path / "other"),
        model=tiny_model(vocab_size=200),
        checkpoint=CheckpointConfig(load_weights=saved.run_dir),
    )
    with pytest.raises(
        CheckpointError, match=r"word_embeddings.weight has shape \[128, 64\] in the checkpoint"
    ) as error:
        start(other)
    assert "export it with convert to-hf" in error.value.fix


def test_a_missing_tensor_is_named(one_rank, tmp_path):
    settings = {"model": config_to_dict(tiny_model())}
    write_weights(tmp_path / "source", {"model.other": torch.zeros(1)}, settings)
    config = dataclasses.replace(
        tiny_run(str(tmp_path / "run")), checkpoint=CheckpointConfig(load_weights=str(tmp_path / "source"))
    )
    with pytest.raises(CheckpointError, match="is not in the checkpoint"):
        start(config)


def test_a_folder_without_weights_is_named(one_rank, tmp_path):
    config = dataclasses.replace(
        tiny_run(str(tmp_path / "run")), checkpoint=CheckpointConfig(load_weights=str(tmp_path / "none"))
    )
    with pytest.raises(CheckpointError, match="no complete checkpoint found"):
        start(config)


def test_a_checkpoint_of_weights_alone_is_not_resumed(saved, tmp_path):
    run_dir = tmp_path / "weights_only"
    shutil.copytree(saved.run_dir, run_dir)
    path = checkpoint_path(run_dir, 2)
    write_manifest(path, dataclasses.replace(read_manifest(path), progress={}))
    with pytest.raises(CheckpointError, match="holds only weights"):
        start(dataclasses.replace(saved, run_dir=str(run_dir)))


def test_other_data_at_resume_is_refused(saved):
    with pytest.raises(ConfigError, match="trained on data plan fixed, the config now gives changed"):
        start(saved, FixedPlan.of(saved, hash="changed", hashes=PlanHashes("changed", "changed", ())))


def test_a_plan_that_leaves_out_what_an_earlier_version_kept_is_refused_with_the_reason(saved):
    plan = FixedPlan.of(saved, hash="changed", hashes=PlanHashes("changed", "fixed", ("other",)), nothing_to_train=4)
    message = (
        "config now gives changed, which leaves out 4 samples with nothing_to_train, .* and length of the training"
    )
    with pytest.raises(ConfigError, match=message):
        start(saved, plan)


def test_a_checkpoint_of_an_earlier_version_asks_for_the_blend_as_it_was(saved, tmp_path):
    run_dir = tmp_path / "earlier"
    shutil.copytree(saved.run_dir, run_dir)
    path = checkpoint_path(run_dir, 2)
    manifest = read_manifest(path)
    added = ("plan_settings_hash", "plan_datasets", "consumed_hash")
    progress = {name: value for name, value in manifest.progress.items() if name not in added}
    write_manifest(path, dataclasses.replace(manifest, progress=progress))
    config = dataclasses.replace(saved, run_dir=str(run_dir))
    changed = PlanHashes("changed", "fixed", ("fixed", "another"))
    with pytest.raises(ConfigError, match=r"data.blend may get steps after the next checkpoint is saved"):
        start(config, FixedPlan.of(saved, hash="changed", hashes=changed))
    assert start(config).iteration == 2


def test_another_model_at_resume_is_refused_by_key(saved):
    with pytest.raises(ConfigError, match=r"model.language.rotary_base is 20000.0, .* trained with 10000.0 .*iter_0+2"):
        start(dataclasses.replace(saved, model=tiny_model(rotary_base=2e4)))


def test_weights_start_no_model_in_which_they_mean_something_else(saved, tmp_path, caplog):
    def start_with(**language):
        checkpoint = CheckpointConfig(load_weights=saved.run_dir)
        model = tiny_model(**language)
        return start(dataclasses.replace(saved, run_dir=str(tmp_path / "x"), model=model, checkpoint=checkpoint))

    assert start_with(rotary_base=2e4).iteration == 0
    assert "model.language.rotary_base is 20000.0, the weights were trained with 10000.0" in caplog.text
    with pytest.raises(ConfigError, match=r"layernorm_epsilon is 0.01, the weights were trained with 1e-05"):
        start_with(layernorm_epsilon=0.01)


def test_a_longer_plan_of_the_same_data_is_resumed_with_one_warning(saved, caplog):
    longer = FixedPlan.of(saved, hash="longer", num_iterations=9)
    assert start(saved, longer).iteration == 2
    (warning,) = [record.message for record in caplog.records if "train_iters" in record.message]
    assert re.match(r"train_iters changes from \d to 9: from iteration 3 on, the learning rate", warning)


def test_a_plan_that_begins_otherwise_is_refused(saved):
    with pytest.raises(ConfigError, match=r"has done 2 iterations, .* agree only in the first 1.*restore the length"):
        start(saved, FixedPlan.of(saved, hash="longer", stable_iterations=1))


def test_a_save_replaces_the_checkpoint_of_a_lost_attempt(saved):
    save(saved, 2)
    assert list_iterations(saved.run_dir) == [2, 1]
    assert start(saved).iteration == 2


@pytest.mark.parametrize("was_distributed", [True, False])
@pytest.mark.parametrize("is_distributed", [True, False])
def test_optimizer_of_an_earlier_version_is_refused(one_rank, tmp_path, monkeypatch, was_distributed, is_distributed):
    save_as_before(tiny_run(str(tmp_path), parallel={"use_distributed_optimizer": was_distributed}), monkeypatch)
    with pytest.raises(CheckpointError, match=r"saved by an earlier version.*checkpoint\.load_weights"):
        start(tiny_run(str(tmp_path), parallel={"use_distributed_optimizer": is_distributed}))


@pytest.mark.parametrize(("recipe", "num_warnings"), [("delayed", 1), ("tensorwise", 0)])
def test_missing_history_of_fp8_scales_is_one_warning(saved, caplog, recipe, num_warnings):
    state = start(dataclasses.replace(saved, run_dir=saved.run_dir + "_new"))
    training = dataclasses.replace(saved.training, precision="bf16", fp8="hybrid", fp8_recipe=recipe)
    resume(dataclasses.replace(saved, training=training), state.chunks, state.optimizer)
    assert sum("no history of FP8 scales" in record.message for record in caplog.records) == num_warnings
