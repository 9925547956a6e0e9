"""The optimizer's state for a checkpoint: every rank describes, writes and reads only what it owns.

megatron-core's `fully_reshardable` state gathers the whole optimizer of a pipeline stage on every rank, and cuts it at
wrong places if a gradient bucket before the last ends with padding (0.16.1, `DistributedOptimizer`:
`get_parameter_state_dp_zero` joins the buckets without padding, `sharded_param_state_fully_reshardable` counts it).
Here, no bucket is involved. A rank owns a range of a flattened parameter; the checkpoint stores it as boxes of a tensor
with the parameter's own shape. The tensors have names like those that megatron-core gives them,
`optimizer.state.exp_avg.KEY`, but each layer has its own, because some layers may be frozen. They can be loaded at any
data-, tensor- and pipeline-parallel size.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_vlm.checkpoint.adam_state import create_state, inner_optimizers, step_count, values_of
from megatron_vlm.checkpoint.boxes import split_flat_range
from megatron_vlm.checkpoint.parallel_files import STATE_PREFIX

STEP = "step"


def describe_optimizer(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> dict[str, Any]:
    """Return this rank's part of the optimizer's state; no other rank is asked.

    Args:
        optimizer: gets the state of an Adam that has not taken a step yet where it has none.
        model_state: sharded state of all model chunks, whose tensors are the parameters themselves.

    Returns:
        `step`, as far as this rank knows it, and `state`: the sharded tensors under running numbers, left out by a rank
        that owns none, so that all ranks agree on the entries that are no tensors.
    """
    parts: list[ShardedTensor] = []
    described = [value for value in nested_values(model_state) if isinstance(value.data, Tensor)]
    for inner in inner_optimizers(optimizer):
        if getattr(inner, "optimizer", None) is None:
            continue
        create_state(inner.optimizer)
        for value in described:
            owned = _owned_range(inner, value.data)
            if owned is not None:
                parts += _describe_parameter(inner, value, *owned)
    tensors = {str(number): part for number, part in enumerate(parts)}
    return {STEP: step_count(optimizer), **({"state": tensors} if tensors else {})}


def fill_optimizer(held: dict[str, Tensor], loaded: dict[str, Tensor]) -> None:
    """Copy what was loaded into the optimizer.

    What this rank read itself is there already. What it got from another rank is in a tensor of its own on the host.

    Args:
        held: the tensors of `state` before loading, which are the optimizer's own.
        loaded: those that loading returned.
    """
    for name, values in held.items():
        if loaded[name].data_ptr() != values.data_ptr():
            values.copy_(loaded[name].view(values.shape))


def _owned_range(inner: Any, parameter: Tensor) -> tuple[Tensor, int] | None:
    """Return Adam's values of a parameter and their first place in the flattened parameter; None if it has none."""
    if not hasattr(inner, "gbuf_ranges"):
        main = getattr(parameter, "main_param", parameter)
        return (main, 0) if main in inner.optimizer.state else None
    if parameter not in inner.model_param_gbuf_map:
        return None
    buffer, dtype, bucket = inner.model_param_gbuf_map[parameter]
    begin = inner.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]["param"].start
    group, order = inner.model_param_group_index_map[parameter]
    return inner.optimizer.param_groups[group]["params"][order], begin


def _describe_parameter(
    inner: Any, value: ShardedTensor | ShardedTensorFactory, main: Tensor, begin: int
) -> Iterator[ShardedTensor]:
    parameter = value.data
    is_sharded = hasattr(inner, "gbuf_ranges")
    with torch.no_grad():
        parts = list(nested_values(value.build())) if isinstance(value, ShardedTensorFactory) else [value]
    for part in parts:
        if not part.data.is_contiguous():
            raise RuntimeError(f"{part.key} is stored as parts that are not ranges of the flattened parameter")
        place = part.data.storage_offset() - parameter.storage_offset()
        replica_id = _replica_id(part, parameter) if is_sharded else part.replica_id
        for name, values in values_of(inner.optimizer, main).items():
            key = f"{STATE_PREFIX}.{name}.{_own_key(part)}"
            for box in _boxes_of(part, place, key, values, begin):
                # Ranges are no regular grid; megatron-core must know it of all ranks alike.
                grid = None if is_sharded else part.axis_fragmentations
                if grid is not None:
                    grid = grid[part.prepend_axis_num :]
                yield replace(box, replica_id=replica_id, axis_fragmentations=grid)


def _own_key(part: ShardedTensor) -> str:
    """Return the key of a parameter of one layer; that of the weights is shared by all layers, of which some may rest.

    The checkpoint would have no values for those.
    """
    number = ".".join(str(index) for index in part.global_offset[: part.prepend_axis_num])
    before, layers, inside = part.key.rpartition(".layers.")
    return f"{before}{layers}{number}.{inside}" if number else part.key


def _replica_id(part: ShardedTensor, parameter: Tensor) -> tuple[int, ...]:
    """Return which of its copies a range is that no other data-parallel rank owns.

    The last number of megatron-core's triple counts copies along the data-parallel ranks, and for the parts that every
    rank holds whole, along the tensor-parallel ones as well. Of a range, only these can have copies.
    """
    copy = 0 if getattr(parameter, "tensor_model_parallel", False) else parallel_state.get_tensor_model_parallel_rank()
    return (*part.replica_id[:-1], copy)


def _boxes_of(part: ShardedTensor, place: int, key: str, values: Tensor, begin: int) -> Iterator[ShardedTensor]:
    """Yield the boxes of a stored tensor that hold `values`.

    Args:
        part: what the checkpoint stores of the parameter.
        place: first place of the part in the flattened parameter.
        key: of the stored tensor.
        values: float[n], a range of the flattened parameter.
        begin: its first place in the flattened parameter.
    """
    first = max(begin, place)
    last = min(begin + values.numel(), place + prod(part.local_shape))
    num_prepended = part.prepend_axis_num
    for box in split_flat_range(tuple(part.local_shape), first - place, max(first, last) - place):
        start, offset = place - begin, part.global_offset[num_prepended:]
        yield ShardedTensor(
            key,
            values[start + box.begin : start + box.end].view(box.sizes),
            values.dtype,
            box.sizes,
            part.global_shape[num_prepended:],
            tuple(whole + own for whole, own in zip(offset, box.offsets, strict=True)),
            axis_fragmentations=None,
        )
