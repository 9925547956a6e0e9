"""The state that a rank saves to a checkpoint and loads from one."""

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vlm.checkpoint.adam_state import set_step_count
from megatron_vlm.checkpoint.optimizer_state import STEP, describe_optimizer, fill_optimizer
from megatron_vlm.checkpoint.parallel_files import read_state
from megatron_vlm.checkpoint.pickles import check_metadata
from megatron_vlm.config import CheckpointError

SHARDING_METADATA = {"singleton_local_shards": False}
"""How megatron-core names the weights: layers are stacked, the halves of a gated MLP are one tensor."""
MODEL_PREFIX = "model."
OPTIMIZER_KEY = "optimizer"


def describe_model(
    chunks: Sequence[MegatronModule], present: Container[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Return the sharded state of each model chunk under `model0`, `model1`, ...

    Args:
        chunks: of this rank.
        present: when loading, the keys of all objects in the checkpoint; other objects are left out. An object is the
            extra state of a module, such as FP8 scales; modules of transformer-engine ask for it, others do not.
            When saving, None: objects that hold nothing are left out.
    """
    return {f"model{index}": _describe_chunk(chunk, present) for index, chunk in enumerate(chunks)}


def _describe_chunk(chunk: MegatronModule, present: Container[str] | None) -> dict[str, Any]:
    state = chunk.sharded_state_dict(prefix=MODEL_PREFIX, metadata=dict(SHARDING_METADATA))
    return {key: value for key, value in state.items() if not _is_left_out(value, present)}


def _is_left_out(value: Any, present: Container[str] | None) -> bool:
    if not isinstance(value, ShardedObject):
        return False
    return _is_empty(value.data) if present is None else value.unique_key not in present


def _is_empty(data: Any) -> bool:
    if isinstance(data, Tensor):
        return not data.numel()
    return data is None or (hasattr(data, "getbuffer") and not data.getbuffer().nbytes)


def describe(
    chunks: Sequence[MegatronModule], optimizer: MegatronOptimizer, present: Container[str] | None = None
) -> dict[str, Any]:
    """Return the sharded state of model and optimizer; no other rank is asked.

    Args:
        chunks: of this rank.
        optimizer: of this rank.
        present: as in `describe_model`.
    """
    state: dict[str, Any] = dict(describe_model(chunks, present))
    state[OPTIMIZER_KEY] = describe_optimizer(optimizer, state)
    return state


def load_model(checkpoint: Path, chunks: Sequence[MegatronModule]) -> None:
    """Load this rank's weights from a checkpoint saved at any layout.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    present = _read_index(checkpoint)
    state = describe_model(chunks, present)
    check_tensors(checkpoint, state, present)
    _fill_model(chunks, read_state(state, checkpoint))


def load_all(checkpoint: Path, chunks: Sequence[MegatronModule], optimizer: MegatronOptimizer) -> int:
    """Load this rank's weights and optimizer state from a checkpoint saved at any layout.

    Returns:
        The number of extra states of modules, such as FP8 scales, that were loaded.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    present = _read_index(checkpoint)
    _check_optimizer(checkpoint)
    state = describe(chunks, optimizer, present)
    check_tensors(checkpoint, state, present)
    num_objects = sum(isinstance(value, ShardedObject) for value in nested_values(state))
    held = {name: part.data for name, part in state[OPTIMIZER_KEY].get("state", {}).items()}
    loaded = read_state(state, checkpoint)
    _fill_model(chunks, loaded)
    fill_optimizer(held, loaded[OPTIMIZER_KEY].get("state", {}))
    set_step_count(optimizer, loaded[OPTIMIZER_KEY][STEP])
    return num_objects


def _check_optimizer(checkpoint: Path) -> None:
    """Refuse the optimizer's state of earlier versions before its tensors are looked for, some of which had no name.

    They stored values at wrong places where gradient buckets were padded, and no one can tell.
    """
    common = load_common_state_dict(str(checkpoint))
    if STEP not in common.get(OPTIMIZER_KEY, {}):
        raise CheckpointError(
            "the optimizer's state was saved by an earlier version",
            where=str(checkpoint),
            fix="name the checkpoint in checkpoint.load_weights and train in another run_dir",
        )


def _read_index(checkpoint: Path) -> dict[str, ShardedBase]:
    """Return what the checkpoint holds, by key: tensors without data, and objects."""
    check_metadata(checkpoint)
    return load_sharded_metadata(str(checkpoint))


def check_tensors(checkpoint: Path, state: dict[str, Any], present: Mapping[str, ShardedBase]) -> None:
    """Compare the requested tensors with those in the checkpoint.

    megatron-core accepts an embedding of another shape and reads the rows that fit; a vocabulary padded differently
    must not pass.

    Raises:
        CheckpointError: names the first tensor that is missing or has another shape.
    """
    for value in nested_values(state):
        for tensor in _tensors_of(value):
            found = present.get(tensor.key)
            if found is None:
                raise CheckpointError(
                    f"tensor {tensor.key} is not in the checkpoint",
                    where=str(checkpoint),
                    fix="use a checkpoint of the same model and the same type of optimizer",
                )
            if tuple(found.global_shape) != tuple(tensor.global_shape):
                raise CheckpointError(
                    f"tensor {tensor.key} has shape {list(found.global_shape)} in the checkpoint, "
                    f"{list(tensor.global_shape)} in the model",
                    where=str(checkpoint),
                    fix="use the model section that the checkpoint was saved with",
                )


def _tensors_of(value: Any) -> list[ShardedTensor]:
    if isinstance(value, ShardedTensorFactory):
        return [tensor for tensor in nested_values(value.build()) if isinstance(tensor, ShardedTensor)]
    return [value] if isinstance(value, ShardedTensor) else []


def _fill_model(chunks: Sequence[MegatronModule], loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(chunks):
        weights = {key.removeprefix(MODEL_PREFIX): value for key, value in loaded[f"model{index}"].items()}
        result = chunk.load_state_dict(weights, strict=False)
        missing = [key for key in result.missing_keys if not key.endswith("_extra_state")]
        if missing or result.unexpected_keys:
            raise RuntimeError(f"the state of the model and the checkpoint differ: {missing} {result.unexpected_keys}")
