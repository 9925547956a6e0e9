"""Round a matrix to a few levels, group by group of its inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_RANGE = 1e-5
"""Groups whose weights are closer together than this [-] get the step of one that is this wide."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The levels that a weight is rounded to."""

    is_symmetric: bool
    """Whether zero is the middle level of every group; otherwise each group has a zero of its own."""
    bits: int = 4

    @property
    def highest(self) -> int:
        """Number of the highest level; the lowest is 0."""
        return 2**self.bits - 1


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix of `out` rows, whose weights are `(values - zeros) * scales` in groups of G inputs."""

    values: Tensor
    """uint8[out, in]: levels, from 0."""
    scales: Tensor
    """float[out, in / G]: difference of two levels."""
    zeros: Tensor
    """uint8[out, in / G]: the level of weight 0."""

    @property
    def group_size(self) -> int:
        """Inputs that share a scale: G."""
        return self.values.shape[1] // self.scales.shape[1]

    def dequantise(self) -> Tensor:
        """Return the weights, float32[out, in]."""
        steps = into_groups(self.values, self.group_size).float() - self.zeros.float()[..., None]
        return (steps * self.scales.float()[..., None]).flatten(1)


def into_groups(matrix: Tensor, group_size: int) -> Tensor:
    """Return a view [out, in / G, G] of a matrix [out, in]."""
    return matrix.unflatten(1, (-1, group_size))


def quantise(weight: Tensor, group_size: int, grid: Grid, scale_dtype: torch.dtype = torch.float32) -> Quantised:
    """Round to the nearest level.

    The levels of a group span its weights and 0. llm-awq leaves out the 0, which differs only where all weights of a
    group have one sign; there its levels end before the largest weight.

    Args:
        weight: float[out, in].
        group_size: G, which divides `in`.
        grid: the levels.
        scale_dtype: type in which scales are stored; levels are chosen for the scales as stored.

    Source: AWQ, arXiv:2306.00978; the symmetric grid as in compressed-tensors, whose outermost levels are
        +-(levels - 1) / 2 steps from 0.
    """
    groups = into_groups(weight.float(), group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    span = 2 * torch.maximum(-low, high) if grid.is_symmetric else high - low
    scales = (span.clamp(min=_LEAST_RANGE) / grid.highest).to(scale_dtype)
    steps = scales.float()
    if grid.is_symmetric:
        zeros = torch.full_like(steps, (grid.highest + 1) // 2)
    else:
        zeros = (-low / steps).round_().clamp_(0, grid.highest)
    levels = (groups / steps[..., None]).round_().add_(zeros[..., None]).clamp_(0, grid.highest)
    return Quantised(levels.flatten(1).to(torch.uint8), scales, zeros.to(torch.uint8))


def rounded(weight: Tensor, group_size: int, grid: Grid) -> Tensor:
    """Return the weights of the nearest levels, float32[out, in]: `quantise` with exact scales, then `dequantise`."""
    return quantise(weight, group_size, grid).dequantise()
