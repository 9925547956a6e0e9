"""Every file of convert/projectors converts the projection of its name; a new one needs no other file to know it."""

import importlib
import inspect
import sys

import pytest
import torch

from megatron_vlm.config import CheckpointError
from megatron_vlm.config.modules import module_names
from megatron_vlm.config.projectors import make_projector
from megatron_vlm.convert import projectors
from megatron_vlm.convert.projector import (
    KEY_PREFIX,
    PROJECTORS,
    ProjectorFamily,
    find_projector,
    projector_type_of,
)

NAMES = module_names(PROJECTORS)
SIZES = {"input_size": 6, "output_size": 4}
TOY = """
ACTIVATION = "toy"

def rules(config, *, input_size, output_size): return []
def draw(config, *, input_size, output_size, std, generator): return {}
"""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", ["rules", "draw"])
def test_every_file_offers_the_functions_of_a_projector(name, function):
    offered = inspect.signature(getattr(importlib.import_module(f"{PROJECTORS}.{name}"), function))
    wanted = inspect.signature(getattr(ProjectorFamily, function))
    assert list(offered.parameters) == list(wanted.parameters)[1:]


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_of_a_projection_that_there_is(name):
    assert name in module_names("megatron_vlm.config.projectors")
    assert projector_type_of(find_projector(name).ACTIVATION, "config.json") == name


@pytest.mark.parametrize("name", NAMES)
def test_what_is_drawn_is_what_the_table_has_and_the_settings_count(name):
    config, projector = make_projector(name), find_projector(name)
    generator = torch.Generator().manual_seed(0)
    drawn = projector.draw(config, **SIZES, std=0.02, generator=generator)
    rules = projector.rules(config, **SIZES)
    assert {key: tuple(tensor.shape) for key, tensor in drawn.items()} == {rule.key: rule.shape for rule in rules}
    assert all(key.startswith(KEY_PREFIX) for key in drawn)
    assert sum(tensor.numel() for tensor in drawn.values()) == sum(config.parameter_sizes(*SIZES.values()).values())


def test_a_projection_without_a_file_is_refused():
    with pytest.raises(CheckpointError, match=r"a projection of type none has no conversion .*fix: use .*mlp2x_gelu"):
        find_projector("none")


def test_an_unknown_activation_is_refused():
    with pytest.raises(CheckpointError, match=r"projector_hidden_act=relu \(config.json\); fix: use .*gelu"):
        projector_type_of("relu", "config.json")


def test_a_new_file_is_a_new_projector(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(projectors, "__path__", [*projectors.__path__, str(tmp_path)])
    try:
        assert find_projector("toy").ACTIVATION == "toy"
        assert projector_type_of("toy", "config.json") == "toy"
    finally:
        sys.modules.pop(f"{PROJECTORS}.toy", None)
