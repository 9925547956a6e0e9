"""Compare two checkpoints tensor by tensor, in the memory of one layer of each."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vlm.checkpoint.tensors import is_stacked, list_tensors, read_tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22
"""Values that are compared at once in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What was found of one tensor; of tensors that stack layers, of one layer."""

    name: str
    difference: str | None
    """How the second differs from the first; None: all bits are equal."""


def compare_checkpoints(first: Path, second: Path, *, with_optimizer: bool) -> Iterator[Comparison]:
    """Compare all tensors of two checkpoints, saved at any layouts.

    Args:
        first: its folder; what it lacks is read from its base.
        second: likewise.
        with_optimizer: compare the optimizer's state, too.

    Raises:
        CheckpointError: an index or a file is damaged; a base is missing.
    """
    ours, theirs = (list_tensors(path, with_optimizer=with_optimizer) for path in (first, second))
    for key in sorted({*ours, *theirs}):
        if key not in ours or key not in theirs:
            yield Comparison(name=key, difference=f"is only in {first if key in ours else second}")
        elif ours[key] != theirs[key]:
            found = [f"{list(shape)} {_name(dtype)}" for shape, dtype in (ours[key], theirs[key])]
            yield Comparison(name=key, difference=f"is {found[0]} and {found[1]}")
        else:
            for layer in range(ours[key][0][0]) if is_stacked(key) else (None,):
                values = [read_tensor(path, key, layer) for path in (first, second)]
                name = key if layer is None else f"{key}[{layer}]"
                yield Comparison(name=name, difference=_difference(*values))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _difference(first: Tensor, second: Tensor) -> str | None:
    """Return how two tensors of one shape and type differ, None if they do not."""
    number, largest, magnitude = 0, 0.0, 0.0
    chunks = (tensor.contiguous().flatten().split(_CHUNK) for tensor in (first, second))
    for ours, theirs in zip(*chunks, strict=True):
        bits = _BITS[ours.dtype.itemsize]
        differs = int((ours.view(bits) != theirs.view(bits)).sum())
        magnitude = max(magnitude, ours.double().abs().max().item())
        if differs:
            number += differs
            distance = (ours.double() - theirs.double()).abs().max().item()
            largest = distance if distance != distance else max(largest, distance)
    if not number:
        return None
    share = f" of values up to {magnitude:.3g}"
    return f"differs in {number} of {first.numel()} values, by up to {largest:.3g}{share}"
