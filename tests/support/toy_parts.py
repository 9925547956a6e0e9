"""A projection and an adapter that the package does not have, as the files that a user would add."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config import TrainConfig, load_config
from tests.support.jobs import Steps, train_steps

# Each token is made of 2 x 2 patches, side by side, by one linear layer.
PROJECTOR_CONFIG = """
from dataclasses import dataclass
from typing import Literal
from megatron_vlm.config.activations import Activations
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.operations import Operations

@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    type: Literal["pixel_shuffle"] = "pixel_shuffle"
    factor: int = 2

    def token_grid(self, patches):
        return Grid(patches.rows // self.factor, patches.columns // self.factor)

    def parameter_sizes(self, input_size, output_size):
        return {"linear.weight": self.factor**2 * input_size * output_size, "linear.bias": output_size}

    def operations(self, patches, input_size, output_size):
        return Operations(entry=2 * self.token_grid(patches).size * self.factor**2 * input_size * output_size)

    def activations(self, patches, input_size, output_size, *, learns):
        return Activations(kept=patches.size * input_size if learns else 0)
"""
PROJECTOR_MODEL = """
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_vlm.models.layers.replicas import Replicated

def build(config, computation, groups, *, patches, input_size, output_size, init_method_std):
    megatron = TransformerConfig(
        num_layers=1, hidden_size=output_size, num_attention_heads=1, **computation.common_arguments()
    )
    return PixelShuffle(megatron, config.factor, groups, input_size)

class PixelShuffle(Replicated):
    def __init__(self, config, factor, groups, input_size):
        super().__init__(config=config)
        self.factor, self.groups, self.tp_group = factor, groups, groups.own
        self.linear = torch.nn.Linear(factor**2 * input_size, config.hidden_size, dtype=config.params_dtype)

    def forward(self, x):
        n, p, h = x.shape
        side, factor = int(p**0.5) // self.factor, self.factor
        x = x.view(n, side, factor, side, factor, h).transpose(2, 3)
        return self.linear(x.reshape(n, side * side, factor * factor * h))
"""
# Beside the MLP of every decoder layer, two narrow matrices whose sum with it is zero at first.
ADAPTER_CONFIG = """
from dataclasses import dataclass
from typing import Literal
from megatron_vlm.config.activations import Activations
from megatron_vlm.config.operations import Operations

@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    type: Literal["beside_mlp"] = "beside_mlp"
    rank: int
    parts: tuple[str, ...] = ("language_model",)

    def parameter_names(self, model, part):
        layers = range(model.language.num_layers)
        return tuple(f"decoder.layers.{layer}.{name}.weight" for layer in layers for name in ("down", "up"))

    def num_parameters(self, model, part, *, num_layers, tensor_parallel_size):
        return num_layers * 2 * model.language.hidden_size * self.rank

    def operations(self, model, part, num_positions, num_image_tokens):
        return Operations(
            inner=model.language.num_layers * 2 * num_positions * 2 * model.language.hidden_size * self.rank
        )

    def activations(self, model, part, num_positions, num_image_tokens, *, num_layers, tensor_parallel_size):
        return Activations(kept=num_layers * num_positions * (model.language.hidden_size + self.rank))
"""
ADAPTER_MODEL = """
from functools import partial
import torch

def apply(config, model):
    for layer in model.language_model.decoder.layers:
        hidden = layer.config.hidden_size
        layer.down = torch.nn.Linear(hidden, config.rank, bias=False)
        layer.up = torch.nn.Linear(config.rank, hidden, bias=False)
        torch.nn.init.zeros_(layer.up.weight)
        layer.mlp.register_forward_hook(partial(_add, layer))

def start(config, model):
    pass

def _add(layer, mlp, inputs, outputs):
    output, bias = outputs
    return output + layer.up(layer.down(inputs[0])), bias
"""
FILES = {
    "megatron_vlm.config.projectors": ("pixel_shuffle", PROJECTOR_CONFIG),
    "megatron_vlm.models.projectors": ("pixel_shuffle", PROJECTOR_MODEL),
    "megatron_vlm.config.adapters": ("beside_mlp", ADAPTER_CONFIG),
    "megatron_vlm.models.adapters": ("beside_mlp", ADAPTER_MODEL),
}


def write_parts(folder: Path) -> None:
    """Write the files, each into a folder named after its package."""
    for package, (name, text) in FILES.items():
        (folder / package).mkdir(parents=True)
        (folder / package / f"{name}.py").write_text(text)


@contextmanager
def parts_on_path(folder: Path) -> Iterator[None]:
    """Add the files to the search path of their packages; no file of the package is edited."""
    packages = {package: import_module(package) for package in FILES}
    for package, module in packages.items():
        module.__path__.append(str(folder / package))
    try:
        yield
    finally:
        for package, module in packages.items():
            module.__path__.remove(str(folder / package))
            sys.modules.pop(f"{package}.{FILES[package][0]}", None)


@pytest.fixture
def toy_parts(tmp_path: Path) -> Iterator[Path]:
    """Make the parts available in this process; returns the folder for others."""
    write_parts(tmp_path / "parts")
    with parts_on_path(tmp_path / "parts"):
        yield tmp_path / "parts"


def train_with_parts(folder: Path, config: Path, overrides: Sequence[str], **arguments: Any) -> Steps:
    """Train as `train_steps` does; the settings are loaded here, where the parts are known."""
    with parts_on_path(folder):
        return train_steps(load_config(TrainConfig, config, overrides), **arguments)
