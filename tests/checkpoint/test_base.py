"""A checkpoint of a run with an adapter holds what learns; the rest is read from its base."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from megatron_vlm.checkpoint.folder import checkpoint_path, find_checkpoint
from megatron_vlm.checkpoint.manifest import MANIFEST_NAME, read_manifest, write_manifest
from megatron_vlm.checkpoint.open_model import open_model
from megatron_vlm.checkpoint.run_settings import RunSettings
from megatron_vlm.checkpoint.tensors import hash_weights, list_tensors, read_tensor, write_weights
from megatron_vlm.checkpoint.verify import check_whole, inspect_checkpoint
from megatron_vlm.cli.main import main
from megatron_vlm.config import CheckpointError, ConfigError, TrainConfig, config_to_dict
from tests.support.configs import tiny_model, tiny_run
from tests.support.jobs import save_initial, start, starting_from, train_steps
from tests.support.toy_parts import toy_parts

__all__ = ["toy_parts"]
ROWS = [[0, 1], [2, 3], [4, 5], [6, 7]] * 3
FROZEN = ["vision_model", "language_model"]


def adapted(run_dir: Path, freeze=FROZEN, rank=3) -> TrainConfig:
    """Return a run with the toy adapter; only its weights and the parts that are not frozen learn."""
    from megatron_vlm.config.adapters.beside_mlp import Config

    model = dataclasses.replace(tiny_model(), adapter=Config(rank=rank))
    return tiny_run(str(run_dir), model=model, training={"freeze": tuple(freeze)})


@pytest.fixture
def base(one_rank, toy_parts, tmp_path):
    """A run folder with a checkpoint of random weights."""
    config = tiny_run(str(tmp_path / "base"))
    save_initial(config)
    return config.run_dir


def train(config: TrainConfig, num_steps: int, save: bool = True) -> list[float]:
    return train_steps(config, ROWS, num_samples=8, num_steps=num_steps, save=save).losses


@pytest.fixture
def trained(base, tmp_path):
    """A run with an adapter and a checkpoint of iteration 2."""
    config = starting_from(adapted(tmp_path / "run"), base)
    train(config, 2)
    return config


def settings_of(config: TrainConfig) -> RunSettings:
    checkpoint = find_checkpoint(config.run_dir)
    return RunSettings(checkpoint=checkpoint, model=config.model, tokenizer=Path("unused"), image_aspect="pad")


def weights(state):
    return {name: weight.detach().clone() for name, weight in state.chunks[0].named_parameters()}


def learned_keys(config: TrainConfig) -> set[str]:
    from megatron.core import dist_checkpointing

    return set(dist_checkpointing.load_tensors_metadata(str(find_checkpoint(config.run_dir))))


def test_a_checkpoint_holds_what_learns_and_the_optimizer_of_it(trained):
    keys = learned_keys(trained)
    assert keys
    assert all(".up." in key or ".down." in key or ".vision_projection." in key for key in keys)
    assert {key for key in keys if key.startswith("optimizer.")}
    size = sum(path.stat().st_size for path in checkpoint_path(trained.run_dir, 2).glob("*.distcp"))
    whole = sum(path.stat().st_size for path in find_checkpoint(trained.checkpoint.load_weights).glob("*.distcp"))
    assert size < whole / 3


def test_a_resumed_run_goes_on_to_the_bit(trained, base, tmp_path):
    whole = train(starting_from(adapted(tmp_path / "whole"), base), 3, save=False)
    assert train(trained, 1, save=False) == whole[2:]


def test_a_tensor_of_which_some_layers_learn_is_saved_whole(base, tmp_path):
    freeze = ("vision_model", "language_model.[eo]*", "language_model.decoder.layers.[0-1].*")
    config = starting_from(adapted(tmp_path / "run", freeze), base)
    whole = train(dataclasses.replace(config, run_dir=str(tmp_path / "whole")), 3, save=False)
    before = weights(start(config))
    assert train(config, 2) == whole[:2]
    assert "model.language_model.decoder.layers.mlp.linear_fc1.weight" in learned_keys(config)
    assert not any("embedding" in key for key in learned_keys(config))
    after = weights(start(config))
    assert {name for name in before if "linear_fc1" in name and torch.equal(before[name], after[name])} == {
        name for name in before if "layers.0.mlp.linear_fc1" in name or "layers.1.mlp.linear_fc1" in name
    } | {name for name in before if "linear_fc1" in name and name.startswith("vision_model.")}
    assert train(config, 1, save=False) == whole[2:]


def test_all_weights_are_listed_read_and_hashed(trained, base):
    checkpoint, from_base = find_checkpoint(trained.run_dir), list_tensors(find_checkpoint(base))
    tensors = list_tensors(checkpoint)
    assert tensors.keys() > from_base.keys()
    frozen, learned = (
        f"model.{part}" for part in ("vision_model.class_token", "vision_projection.encoder.linear_fc1.bias")
    )
    assert torch.equal(read_tensor(checkpoint, frozen), read_tensor(find_checkpoint(base), frozen))
    assert not torch.equal(read_tensor(checkpoint, learned), read_tensor(find_checkpoint(base), learned))
    assert hash_weights(checkpoint) != hash_weights(find_checkpoint(base))


def test_the_whole_model_is_opened(trained):
    expected = weights(start(trained))
    with open_model(settings_of(trained)) as model:
        opened = dict(model.named_parameters())
        assert opened.keys() == expected.keys()
        assert all(torch.equal(opened[name], expected[name]) for name in expected)


def test_both_runs_may_move_together(trained, tmp_path):
    before = hash_weights(find_checkpoint(trained.run_dir))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("base", "run"):
        shutil.move(tmp_path / name, moved / name)
    assert hash_weights(find_checkpoint(moved / "run")) == before
    config = dataclasses.replace(trained, run_dir=str(moved / "run"))
    assert start(config).base.path.startswith(str(moved))


def test_the_checkpoint_alone_may_move(trained, tmp_path):
    before = hash_weights(find_checkpoint(trained.run_dir))
    shutil.move(trained.run_dir, tmp_path / "deeper" / "down")
    assert hash_weights(find_checkpoint(tmp_path / "deeper" / "down")) == before


def test_a_missing_base_is_one_line_everywhere(trained, base, capsys):
    shutil.rmtree(base)
    checkpoint = find_checkpoint(trained.run_dir)
    line = r"base .*iter_0000000 is missing .*; fix: put it back or link it there"
    with pytest.raises(CheckpointError, match=line):
        start(trained)
    with pytest.raises(CheckpointError, match=line), open_model(settings_of(trained)):
        pass
    with pytest.raises(CheckpointError, match=line):
        list_tensors(checkpoint)
    with pytest.raises(CheckpointError, match=line):
        check_whole(checkpoint)
    assert main(["checkpoint", "verify", trained.run_dir]) == 65
    assert "is missing" in capsys.readouterr().out


def test_another_base_is_refused(trained, base):
    manifest = read_manifest(find_checkpoint(base))
    write_manifest(
        find_checkpoint(base),
        dataclasses.replace(manifest, files={**manifest.files, "x": next(iter(manifest.files.values()))}),
    )
    with pytest.raises(CheckpointError, match="is not the checkpoint that this one was trained from"):
        start(trained)
    (fault,) = inspect_checkpoint(find_checkpoint(trained.run_dir), read_files=False).faults
    assert "is not the checkpoint" in fault


def test_a_damaged_base_is_refused(trained, base, capsys):
    next(find_checkpoint(base).glob("*.distcp")).write_bytes(b"")
    with pytest.raises(CheckpointError, match="checkpoint is damaged: .* has 0 bytes"):
        start(trained)
    assert main(["checkpoint", "verify", trained.run_dir]) == 65
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] == "valid" for line in lines] == [True, False]  # the checkpoint, then its base


def test_a_run_without_a_base_does_not_start(one_rank, toy_parts, tmp_path):
    with pytest.raises(ConfigError, match=r"beside_mlp needs a model to adapt, .*load_weights is not set"):
        start(adapted(tmp_path / "run"))


def test_a_resumed_run_must_train_the_same_weights(trained):
    for freeze, said in (((*FROZEN, "vision_projection"), "does not learn now"), (FROZEN[:1], "learns now")):
        config = dataclasses.replace(trained, training=dataclasses.replace(trained.training, freeze=tuple(freeze)))
        with pytest.raises(CheckpointError, match=rf"{said} and did.* fix: restore training.freeze"):
            start(config)


def test_another_run_goes_on_with_other_parts_frozen(trained, tmp_path):
    other = starting_from(adapted(tmp_path / "other", freeze=(*FROZEN, "vision_projection")), trained.run_dir)
    before = weights(start(trained))
    train(other, 1)
    assert not any("vision_projection" in key for key in learned_keys(other))
    after = weights(start(other))  # read from three checkpoints
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if ".up." in name or ".down." in name
    }


def test_learned_weights_are_never_dropped(trained, tmp_path):
    plain = starting_from(tiny_run(str(tmp_path / "plain")), trained.run_dir)
    with pytest.raises(CheckpointError, match=r"the model has no tensor model.language_model.*down"):
        start(plain)


def test_an_adapter_of_another_shape_is_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match=r"model.adapter.rank is 5, the weights were trained with 3"):
        start(starting_from(adapted(tmp_path / "other", rank=5), trained.run_dir))


def test_a_part_of_an_adapter_is_refused(base, tmp_path):
    checkpoint = find_checkpoint(base)
    down = "model.language_model.decoder.layers.down.weight"
    config = adapted(tmp_path / "other")
    settings = {"model": config_to_dict(config.model)}
    write_weights(tmp_path / "half", {down: torch.zeros(4, 3, 64)}, settings, base=checkpoint)
    with pytest.raises(CheckpointError, match=r"tensor model.*up.weight is not in the checkpoint"):
        start(starting_from(config, str(tmp_path / "half")))


def test_a_base_is_named_by_its_manifest(trained, base):
    record = read_manifest(find_checkpoint(trained.run_dir)).base
    assert Path(record.path) == find_checkpoint(base).resolve()
    assert (find_checkpoint(trained.run_dir) / record.relative_path / MANIFEST_NAME).is_file()
