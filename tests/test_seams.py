"""A new projection or adapter is one file of settings and one of the model: no file that exists knows of it."""

import dataclasses

import pytest
import torch
import yaml

from megatron_vlm.checkpoint.open_model import open_model
from megatron_vlm.checkpoint.run_settings import RunSettings
from megatron_vlm.config import PART_NAMES, ConfigError, TrainConfig, config_to_dict, load_config
from tests.support.configs import tiny_run
from tests.support.jobs import save_initial, start, starting_from, train_steps
from tests.support.real_costs import assert_costs_are_real
from tests.support.toy_parts import toy_parts, write_parts

__all__ = ["toy_parts"]
ROWS = [[0, 1], [2, 3], [4, 5], [6, 7]] * 2


@pytest.fixture
def write_run(tmp_path, toy_parts, one_rank):
    """Return a tiny run whose file has these sections under `model` and `training`."""

    def write(*, model, **training) -> TrainConfig:
        run = config_to_dict(tiny_run(str(tmp_path / "run")))
        run["model"].update(model)
        run["training"].update(training)
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump(run))
        return load_config(TrainConfig, path)

    return write


def test_a_new_projection_is_loaded_trained_and_counted(write_run):
    config = write_run(model={"projection": {"type": "pixel_shuffle"}})
    assert config.model.constant_image_tokens == 4  # of 4 x 4 patches
    steps = train_steps(config, ROWS, num_samples=8, num_steps=2)
    assert steps.losses[1] < steps.losses[0]
    assert all(norm > 0 for norm in steps.grad_norms)
    assert_costs_are_real(config)


def adapted_run(write_run, tmp_path, freeze):
    """Return a run that adapts the random weights of another one."""
    base = dataclasses.replace(write_run(model={}), run_dir=str(tmp_path / "base"))
    save_initial(base)
    config = write_run(model={"adapter": {"type": "beside_mlp", "rank": 3}}, freeze=freeze)
    return starting_from(config, base.run_dir)


@pytest.mark.distributed
def test_a_new_projection_is_trained_alike_where_some_ranks_have_no_image(workers, tmp_path):
    write_parts(tmp_path / "parts")
    run = config_to_dict(tiny_run(str(tmp_path / "run")))
    run["model"]["projection"] = {"type": "pixel_shuffle"}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(run))
    one, two = (
        workers.run(
            "tests.support.toy_parts:train_with_parts",
            size,
            folder=tmp_path / "parts",
            config=tmp_path / "train.yaml",
            overrides=[f"parallel.tensor_model_parallel_size={size}"],
            rows=ROWS,
            num_samples=8,
            num_steps=2,
            max_images=1,
        )[0]
        for size in (1, 2)
    )
    # float32: sums in another order
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert two.grad_norms == pytest.approx(one.grad_norms, rel=1e-5)


def test_settings_of_a_new_projection_are_checked_like_those_of_the_others(write_run):
    with pytest.raises(ConfigError, match=r"unknown key model.projection.faktor for type pixel_shuffle .*train.yaml"):
        write_run(model={"projection": {"type": "pixel_shuffle", "faktor": 2}})


def test_a_new_adapter_learns_while_the_parts_rest(write_run, tmp_path):
    plain = write_run(model={})
    adapted = adapted_run(write_run, tmp_path, list(PART_NAMES))
    expected = train_steps(plain, ROWS, num_samples=8, num_steps=1).losses[0]
    before = weights_of(start(adapted))
    steps = train_steps(adapted, ROWS, num_samples=8, num_steps=2, save=True)
    assert steps.losses[0] == pytest.approx(expected, rel=1e-6)  # it adds zero at first
    assert steps.losses[1] < steps.losses[0]
    after = weights_of(start(adapted))  # resumed from the checkpoint
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".up." in name or ".down." in name}
    # The count lets the gradient reach the input of every layer, which it does if something before the decoder learns.
    freeze = ("vision_model", "language_model")
    assert_costs_are_real(
        dataclasses.replace(adapted, training=dataclasses.replace(adapted.training, freeze=freeze)), freeze
    )


def weights_of(state):
    return {name: parameter.detach().clone() for name, parameter in state.chunks[0].named_parameters()}


def test_an_adapted_model_is_opened_with_its_adapter(write_run, tmp_path):
    config = adapted_run(write_run, tmp_path, ["vision_model", "language_model"])
    train_steps(config, ROWS, num_samples=8, num_steps=2, save=True)
    trained = weights_of(start(config))
    settings = RunSettings(
        checkpoint=next((tmp_path / "run" / "checkpoints").iterdir()),
        model=config.model,
        tokenizer=tmp_path / "unused",
        image_aspect="pad",
    )
    with open_model(settings) as model:
        opened = dict(model.named_parameters())
        assert opened.keys() == trained.keys()
        assert all(torch.equal(opened[name], trained[name]) for name in trained)
