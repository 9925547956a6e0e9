"""Every file of the folders of parts offers what the protocol of its folder says."""

import dataclasses
import inspect
from importlib import import_module

import pytest

from megatron_vlm.config.adapters import AdapterConfig
from megatron_vlm.config.modules import module_names
from megatron_vlm.config.projectors import ProjectorConfig
from megatron_vlm.config.towers import TowerConfig
from tests.support.toy_parts import toy_parts

__all__ = ["toy_parts"]
PROTOCOLS = {"towers": TowerConfig, "projectors": ProjectorConfig, "adapters": AdapterConfig}
FUNCTIONS = {
    "towers": {"build": ["config", "computation", "groups"]},
    "projectors": {
        "build": ["config", "computation", "groups", "patches", "input_size", "output_size", "init_method_std"]
    },
    "adapters": {"apply": ["config", "model"], "start": ["config", "model"]},
}
PARTS = [(folder, name) for folder in PROTOCOLS for name in module_names(f"megatron_vlm.config.{folder}")]
TOYS = [("projectors", "pixel_shuffle"), ("adapters", "beside_mlp")]


def check_settings(folder, name):
    cls, protocol = import_module(f"megatron_vlm.config.{folder}.{name}").Config, PROTOCOLS[folder]
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert {field.name: field.default for field in dataclasses.fields(cls)}["type"] == name
    for member, wanted in vars(protocol).items():
        if member.startswith("_"):
            continue
        assert hasattr(cls, member), f"{folder}/{name}.py: Config has no {member}"
        if inspect.isfunction(wanted):
            offered = inspect.signature(getattr(cls, member))
            assert list(offered.parameters) == list(inspect.signature(wanted).parameters), member


def check_model(folder, name):
    for function, parameters in FUNCTIONS[folder].items():
        offered = getattr(import_module(f"megatron_vlm.models.{folder}.{name}"), function)
        assert list(inspect.signature(offered).parameters) == parameters, function


@pytest.mark.parametrize(("folder", "name"), PARTS)
def test_every_part_offers_the_names_of_its_folder(folder, name):
    check_settings(folder, name)
    check_model(folder, name)


@pytest.mark.parametrize(("folder", "name"), TOYS)
def test_so_do_the_parts_that_the_tests_add(folder, name, toy_parts):
    check_settings(folder, name)
    check_model(folder, name)


@pytest.mark.parametrize("folder", PROTOCOLS)
def test_every_part_that_can_be_configured_can_be_built(folder):
    assert module_names(f"megatron_vlm.config.{folder}") == module_names(f"megatron_vlm.models.{folder}")
