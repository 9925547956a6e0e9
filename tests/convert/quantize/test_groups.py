import pytest
import torch

from megatron_vlm.convert.quantize.groups import Grid, quantise, rounded

ASYMMETRIC, SYMMETRIC = Grid(is_symmetric=False), Grid(is_symmetric=True)


def weights(rows: int = 12, columns: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", [ASYMMETRIC, SYMMETRIC, Grid(is_symmetric=False, bits=3)])
@pytest.mark.parametrize("offset", [0.0, 4.0, -4.0], ids=["both signs", "all positive", "all negative"])
def test_no_weight_is_farther_from_its_level_than_half_a_step(grid, offset):
    weight = weights() + offset
    found = quantise(weight, 32, grid)
    error = (found.dequantise() - weight).abs().unflatten(1, (-1, 32))
    # The symmetric levels end half a step short of the largest weight above; a zero between two levels shifts all.
    assert (error <= (0.5 + 0.5 + 1e-4) * found.scales[..., None]).all()
    assert found.values.max() <= grid.highest


def test_levels_span_the_weights_of_a_group():
    found = quantise(torch.arange(16.0)[None], 16, ASYMMETRIC)
    assert found.values.tolist() == [list(range(16))]
    assert (found.scales.item(), found.zeros.item()) == (1.0, 0)
    low = quantise(torch.arange(-8.0, 8.0)[None], 16, SYMMETRIC)
    assert low.scales.item() == pytest.approx(16 / 15)
    assert low.zeros.item() == 8


def test_levels_are_chosen_for_scales_as_they_are_stored():
    weight = weights(seed=1)
    found = quantise(weight, 64, ASYMMETRIC, torch.float16)
    assert found.scales.dtype == torch.float16
    steps = found.scales.float()[..., None]
    nearest = (weight.unflatten(1, (-1, 64)) / steps).round() + found.zeros[..., None]
    assert torch.equal(found.values.unflatten(1, (-1, 64)).float(), nearest.clamp(0, 15))


def test_a_group_of_zeros_stays_zero():
    for dtype in (torch.float16, torch.float32):
        assert not quantise(torch.zeros(2, 64), 32, ASYMMETRIC, dtype).dequantise().any()


def test_a_weight_of_zero_stays_zero():
    weight = weights()
    weight[:, ::5] = 0
    for grid in (ASYMMETRIC, SYMMETRIC):
        assert not rounded(weight, 32, grid)[:, ::5].any()
