"""Every file of convert/projectors converts the projection of its name; a new one needs no other file to know it."""

import importlib
import inspect
import sys

import pytest
import torch

from megatron_vlm.checkpoint.tensors import list_tensors
from megatron_vlm.config import CheckpointError
from megatron_vlm.config.modules import module_names
from megatron_vlm.config.projectors import make_projector
from megatron_vlm.convert import projectors
from megatron_vlm.convert.projector import (
    KEY_PREFIX,
    PROJECTORS,
    ProjectorFamily,
    find_projector,
    llava_projector,
    projector_of,
    projector_of_vila,
    vila_projector,
)
from tests.support.configs import tiny_run
from tests.support.jobs import save_initial
from tests.support.parts import PROJECTOR_NAMES, tiny_model_of, tiny_projector

NAMES = module_names(PROJECTORS)
NARROW, WIDE = {"input_size": 6, "output_size": 12}, {"input_size": 6, "output_size": 10}
TOY = """
FITS_LLAVA = False
VILA_TYPES = {}

def llava(config, *, input_size, output_size): return None
def vila_rules(config, *, input_size, output_size): return None
def draw(config, *, input_size, output_size, std, generator): return {}
"""


def drawn(name, **sizes):
    generator = torch.Generator().manual_seed(0)
    return find_projector(name).draw(tiny_projector(name), **sizes, std=0.02, generator=generator)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", ["llava", "vila_rules", "draw"])
def test_every_file_offers_the_functions_of_a_projector(name, function):
    offered = inspect.signature(getattr(importlib.import_module(f"{PROJECTORS}.{name}"), function))
    wanted = inspect.signature(getattr(ProjectorFamily, function))
    assert list(offered.parameters) == list(wanted.parameters)[1:]


def test_there_is_a_file_for_every_projection():
    assert NAMES == PROJECTOR_NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_is_drawn_is_what_a_new_model_has(name, one_rank, tmp_path):
    config = tiny_run(str(tmp_path / "run"), model=tiny_model_of(projector=name))
    save_initial(config)
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("iter_*"))
    stored = {key: shape for key, (shape, _) in list_tensors(checkpoint).items() if key.startswith(KEY_PREFIX)}
    tensors = drawn(name, input_size=config.model.vision.feature_size, output_size=config.model.language.hidden_size)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == stored


@pytest.mark.parametrize("sizes", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("name", NAMES)
def test_tables_have_every_tensor_with_its_shape(name, sizes):
    config, projector = tiny_projector(name), find_projector(name)
    wanted = {key: tuple(tensor.shape) for key, tensor in drawn(name, **sizes).items()}
    llava, vila = projector.llava(config, **sizes), projector.vila_rules(config, **sizes)
    assert (llava is not None) == projector.FITS_LLAVA
    assert (vila is not None) == bool(projector.VILA_TYPES)
    for rules in (llava and llava.rules, vila):
        assert rules is None or {rule.key: rule.checkpoint_shape for rule in rules} == wanted


@pytest.mark.parametrize("sizes", [NARROW, WIDE], ids=["narrow", "wide"])
def test_a_folder_says_which_projection_it_holds(sizes):
    for name in NAMES:
        if find_projector(name).FITS_LLAVA:
            activation = llava_projector(tiny_projector(name), **sizes).activation
            assert projector_of(activation, **sizes, where="config.json") == tiny_projector(name)


def test_a_vila_says_which_projection_it_holds():
    for name in NAMES:
        for theirs, settings in find_projector(name).VILA_TYPES.items():
            config = make_projector(name, **settings)
            assert vila_projector(config, **NARROW).type == theirs
            assert projector_of_vila(theirs, "config.json") == config


def test_an_unknown_projection_of_a_vila_is_refused():
    with pytest.raises(CheckpointError, match=r"mm_projector_type=dsresampler \(config.json\); fix: .*mlp_downsample"):
        projector_of_vila("dsresampler", "config.json")


def test_servers_know_the_activation_of_a_narrow_linear_projection():
    linear = tiny_projector("linear")
    assert [llava_projector(linear, **sizes).activation for sizes in (NARROW, WIDE)] == ["relu", "linear"]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("linear", torch.nn.Linear(6, 12)),
        ("mlp2x_gelu", torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.GELU(), torch.nn.Linear(12, 12))),
        (
            "mlp_downsample",
            torch.nn.Sequential(
                torch.nn.Identity(),  # merges the patches
                torch.nn.LayerNorm(24),
                torch.nn.Linear(24, 12),
                torch.nn.GELU(),
                torch.nn.Linear(12, 12),
            ),
        ),
    ],
)
def test_names_for_vila_are_those_of_its_module(name, layers):
    rules = find_projector(name).vila_rules(tiny_projector(name), **NARROW)
    found = {name: shape for rule in rules for name, shape in zip(rule.names, rule.their_shapes(), strict=True)}
    assert found == {f"layers.{name}": tuple(tensor.shape) for name, tensor in layers.state_dict().items()}


def test_a_projection_without_a_file_is_refused():
    with pytest.raises(CheckpointError, match=r"a projection of type none has no conversion .*fix: use .*mlp2x_gelu"):
        find_projector("none")


def test_an_unknown_activation_is_refused():
    with pytest.raises(CheckpointError, match=r"projector_hidden_act=silu \(config.json\); fix: use relu, gelu"):
        projector_of("silu", **NARROW, where="config.json")


def test_a_new_file_is_a_new_projector(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(projectors, "__path__", [*projectors.__path__, str(tmp_path)])
    try:
        assert not find_projector("toy").FITS_LLAVA
    finally:
        sys.modules.pop(f"{PROJECTORS}.toy", None)
