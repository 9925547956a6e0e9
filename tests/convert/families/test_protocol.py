"""Every file of convert/families is a family; a new one needs no other file to know it."""

import importlib
import inspect
import sys
from typing import get_args

import pytest

from megatron_vlm.config import CheckpointError, UsageError
from megatron_vlm.config.modules import module_names
from megatron_vlm.convert import families
from megatron_vlm.convert.family import (
    FAMILIES,
    Family,
    ModelFamily,
    Part,
    TowerFamily,
    find_family,
    find_format,
    find_tower_family,
)

NAMES = module_names(FAMILIES)
TOY = """
PART = "vision"
MODEL_TYPES = ("toy_vision_model",)

def renames(settings): return ()
def rules(config): return []
def unused(config): return ()
def constants(config): return {}
def config_from_hf(settings, *, where, **chosen): return {**settings, **chosen}
def config_to_hf(config): return dict(config)
"""


def family(name: str):
    return importlib.import_module(f"{FAMILIES}.{name}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", ["renames", "rules", "unused", "constants", "config_from_hf", "config_to_hf"])
def test_every_file_offers_the_functions_of_a_family(name, function):
    offered, wanted = (inspect.signature(getattr(owner, function)) for owner in (family(name), Family))
    of_part, *others = offered.parameters
    wanted_part, *wanted_others = list(wanted.parameters)[1:]
    assert others == wanted_others
    assert of_part == wanted_part or wanted_part == "config"  # named after its part


@pytest.mark.parametrize("name", NAMES)
def test_every_file_says_what_it_is(name):
    assert family(name).PART in get_args(Part)
    assert family(name).MODEL_TYPES


@pytest.mark.parametrize("name", [name for name in NAMES if family(name).PART == "vision"])
def test_a_family_named_after_a_tower_converts_it_within_whole_models(name):
    if name in module_names("megatron_vlm.config.towers"):
        assert isinstance(family(name).FREE, frozenset)
        assert find_family(family(name).VILA_TYPE, "vision", "").PART == "vision"
        offered, wanted = (inspect.signature(owner.reason_against_llava) for owner in (family(name), TowerFamily))
        assert len(offered.parameters) == len(wanted.parameters) - 1
    assert find_family(family(name).MODEL_TYPES[0], "vision", "config.json") is family(name)


@pytest.mark.parametrize("name", [name for name in NAMES if family(name).PART == "model"])
def test_a_family_of_whole_models_can_be_exported_to(name):
    for function in ("write_settings", "find_parts", "reason_against"):
        offered, wanted = (inspect.signature(getattr(owner, function)) for owner in (family(name), ModelFamily))
        assert list(offered.parameters) == list(wanted.parameters)[1:]
    assert find_format(name.replace("_", "-")).ARCHITECTURE


def test_no_two_families_of_a_part_read_the_same_type():
    types = [(family(name).PART, kind) for name in NAMES for kind in family(name).MODEL_TYPES]
    assert len(set(types)) == len(types)


@pytest.mark.parametrize(
    ("model_type", "part", "name"),
    [
        ("llama", "language", "llama"),
        ("clip", "vision", "clip"),
        ("clip_vision_model", "vision", "clip"),
        ("llava", "model", "llava"),
    ],
)
def test_a_family_is_found_by_the_type_of_a_folder(model_type, part, name):
    assert find_family(model_type, part, "config.json") is family(name)


@pytest.mark.parametrize("model_type", ["llama", "unheard_of", None])
def test_a_folder_of_another_kind_is_refused(model_type):
    with pytest.raises(
        CheckpointError, match=rf"model_type is {model_type}, not clip_vision_model or clip or .*\(config"
    ):
        find_family(model_type, "vision", "config.json")


def test_a_tower_without_a_family_is_refused():
    with pytest.raises(
        CheckpointError,
        match=r"type llama has no conversion \(model.vision\); fix: use clip, dinov2, internvit, radio, siglip$",
    ):
        find_tower_family("llama")


def test_an_unknown_format_is_refused():
    with pytest.raises(UsageError, match="unknown export format 'clip'; fix: choose one of llava"):
        find_format("clip")


def test_a_new_file_is_a_new_family(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    try:
        toy = find_family("toy_vision_model", "vision", "config.json")
        assert toy is find_tower_family("toy")
        assert toy.config_from_hf({"depth": 1}, where="config.json", depth=2) == {"depth": 2}
    finally:
        sys.modules.pop(f"{FAMILIES}.toy", None)
