"""Every hook that settings can name has settings, a file that does the work, and errors that name the key."""

import dataclasses
import importlib

import pytest

from megatron_vlm.config import ConfigError, load_config, save_config
from megatron_vlm.config.hooks import profiler, wandb
from megatron_vlm.config.modules import module_names
from megatron_vlm.config.train import TrainConfig
from tests.support.configs import tiny_run

PACKAGE = "megatron_vlm.config.hooks"


@pytest.mark.parametrize("name", module_names(PACKAGE))
def test_every_file_offers_settings_of_a_hook(name):
    config = importlib.import_module(f"{PACKAGE}.{name}").Config
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    assert fields["type"] == name
    assert config.package is None or isinstance(config.package, str)
    assert name in module_names("megatron_vlm.training.hooks")


def load(tmp_path, *overrides):
    save_config(tiny_run(), tmp_path / "run.yaml")
    return load_config(TrainConfig, tmp_path / "run.yaml", overrides)


def test_hooks_are_read_and_saved(tmp_path):
    config = load(tmp_path, "training.hooks=[{type: profiler, iterations: [3, 4]}, {type: wandb, project: p}]")
    assert config.training.hooks == (profiler.Config(iterations=(3, 4)), wandb.Config(project="p"))
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(TrainConfig, tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ("[{type: ledger}]", r"unknown training.hooks\[0\].type 'ledger'.*choose one of profiler, wandb"),
        ("[{project: p}]", r"missing value training.hooks\[0\].type"),
        ("[{type: wandb}]", r"missing value training.hooks\[0\].project"),
        ("[{type: wandb, project: p, team: t}]", r"unknown key training.hooks\[0\].team"),
        ("[{type: profiler, iterations: [0]}]", r"iterations \[0\] are not counted from 1"),
        ("[{type: profiler, iterations: []}]", r"iterations \[\] are not counted from 1"),
        ("[{type: profiler, iterations: [1], ranks: [-1]}]", r"ranks \[-1\] do not exist"),
    ],
)
def test_wrong_hooks_are_one_line(tmp_path, hooks, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, f"training.hooks={hooks}")
