"""A projection against a plain one: its values and all its gradients."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.config.grid import Grid
from megatron_vlm.config.modules import find_module
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.layers.replicas import replica_groups
from tests.support.parts import tiny_projector

INPUT_SIZE, OUTPUT_SIZE, NUM_IMAGES = 12, 20, 3
Weights = Mapping[str, Tensor]


def build(type: str, patches: Grid, *, precision: Any = "fp32", **settings: Any) -> torch.nn.Module:
    """Return a projection with random weights, biases and norms included; needs the fixture `one_rank`."""
    torch.manual_seed(3)
    module = find_module("megatron_vlm.models.projectors", type, "projection").build(
        tiny_projector(type, **settings),
        Computation(precision=precision),
        replica_groups(),
        patches=patches,
        input_size=INPUT_SIZE,
        output_size=OUTPUT_SIZE,
        init_method_std=0.2,
    )
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.3)
    return module


def assert_same(module: torch.nn.Module, reference: Callable[[Weights, Tensor], Tensor], patches: Grid) -> None:
    """Compare values, and gradients of the features and of every weight; the reference computes in float64."""
    weights = {name: parameter.detach().double().requires_grad_() for name, parameter in module.named_parameters()}
    features = torch.randn(NUM_IMAGES, patches.size, INPUT_SIZE, requires_grad=True)
    exact = features.detach().double().requires_grad_()
    found, expected = module(features), reference(weights, exact)
    assert found.shape == expected.shape
    grad = torch.randn_like(found)
    found.backward(grad)
    expected.backward(grad.double())
    # float32 against float64: rounding of sums of at most a few hundred numbers.
    close = {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(found, expected.float(), **close)
    torch.testing.assert_close(features.grad, exact.grad.float(), **close)
    for name, parameter in module.named_parameters():
        expected_grad = weights[name].grad.float()
        torch.testing.assert_close(
            parameter.grad, expected_grad, **close, msg=lambda text, name=name: f"{name}: {text}"
        )


def merged(features: Tensor, patches: Grid, order: str) -> Tensor:
    """Return 2 x 2 patches side by side, patch by patch; outside the grid there are zeros."""

    def patch(row: int, column: int) -> Tensor:
        inside = row < patches.rows and column < patches.columns
        return features[:, row * patches.columns + column] if inside else torch.zeros_like(features[:, 0])

    rows, columns = range(0, patches.rows, 2), range(0, patches.columns, 2)
    by_row = [(row, column) for row in rows for column in columns]
    corners = by_row if order == "row" else [(row, column) for column in columns for row in rows]
    tokens = [
        torch.cat([patch(row + down, column + right) for down in (0, 1) for right in (0, 1)], dim=-1)
        for row, column in corners
    ]
    return torch.stack(tokens, dim=1)
