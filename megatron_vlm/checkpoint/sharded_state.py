"""The state that a rank saves to a checkpoint and loads from one.

A checkpoint of a run with an adapter holds the weights that learn; those that do not are read from its base.
"""

from collections import ChainMap
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vlm.checkpoint.adam_state import set_step_count
from megatron_vlm.checkpoint.base import with_bases
from megatron_vlm.checkpoint.optimizer_state import STEP, describe_optimizer, fill_optimizer
from megatron_vlm.checkpoint.parallel_files import read_state
from megatron_vlm.checkpoint.pickles import check_metadata
from megatron_vlm.checkpoint.resizing import ask_for_stored, resize_loaded
from megatron_vlm.config import CheckpointError
from megatron_vlm.models.build import is_of_adapter, stays_in_base

SHARDING_METADATA = {"singleton_local_shards": False}
"""How megatron-core names the weights: layers are stacked, the halves of a gated MLP are one tensor."""
MODEL_PREFIX = "model."
_VOCABULARIES = ("word_embeddings.weight", "output_layer.weight")
_FIX_SHAPE = "use the model section that the checkpoint was saved with"
_FIX_ROWS = "; if you do, export it with convert to-hf and import that"
OPTIMIZER_KEY = "optimizer"


def describe_model(
    chunks: Sequence[MegatronModule], present: Container[str] | None = None, *, only_learning: bool = False
) -> dict[str, dict[str, Any]]:
    """Return the sharded state of each model chunk under `model0`, `model1`, ...

    A chunk that holds nothing is left out, so that all ranks agree on the entries that are no tensors.

    Args:
        chunks: of this rank.
        present: when loading, the keys of all objects in the checkpoint; other objects are left out. An object is the
            extra state of a module, such as FP8 scales; modules of transformer-engine ask for it, others do not.
            When saving, None: objects that hold nothing are left out.
        only_learning: leave out what is in the base: weights that learn in no layer.
    """
    states = {f"model{index}": _describe_chunk(chunk, present, only_learning) for index, chunk in enumerate(chunks)}
    return {name: state for name, state in states.items() if state}


def _describe_chunk(chunk: MegatronModule, present: Container[str] | None, only_learning: bool) -> dict[str, Any]:
    state = chunk.sharded_state_dict(prefix=MODEL_PREFIX, metadata=dict(SHARDING_METADATA))
    return {
        key: value
        for key, value in state.items()
        if not _is_left_out(value, present) and not (only_learning and _stays_in_base(value))
    }


def _stays_in_base(value: Any) -> bool:
    return not isinstance(value, ShardedObject) and stays_in_base(value.data)


def _is_left_out(value: Any, present: Container[str] | None) -> bool:
    if not isinstance(value, ShardedObject):
        return False
    return _is_empty(value.data) if present is None else value.unique_key not in present


def _is_empty(data: Any) -> bool:
    if isinstance(data, Tensor):
        return not data.numel()
    return data is None or (hasattr(data, "getbuffer") and not data.getbuffer().nbytes)


def describe(
    chunks: Sequence[MegatronModule],
    optimizer: MegatronOptimizer,
    present: Container[str] | None = None,
    *,
    only_learning: bool = False,
) -> dict[str, Any]:
    """Return the sharded state of model and optimizer; no other rank is asked.

    Args:
        chunks: of this rank.
        optimizer: of this rank.
        present: as in `describe_model`.
        only_learning: as in `describe_model`.
    """
    state: dict[str, Any] = dict(describe_model(chunks, present, only_learning=only_learning))
    state[OPTIMIZER_KEY] = describe_optimizer(optimizer, state)
    return state


def load_model(
    checkpoint: Path,
    chunks: Sequence[MegatronModule],
    *,
    may_add_adapter: bool = False,
    resizes_positions: bool = False,
) -> bool:
    """Load this rank's weights from a checkpoint saved at any layout, and from its base.

    Args:
        checkpoint: its folder.
        chunks: of this rank.
        may_add_adapter: accept a checkpoint without any weight of the adapter; these then stay as they are.
        resizes_positions: accept position embeddings for images of another size, and interpolate them.

    Returns:
        Whether the checkpoint had the weights of the adapter, or the model has no adapter.

    Raises:
        CheckpointError: a tensor is missing or has another shape; the base is missing or another one; or the checkpoint
            has an adapter that the model lacks.
    """
    sources = _open_sources(checkpoint)
    state = describe_model(chunks, sources.present)
    is_complete = not may_add_adapter or _has_adapter(state, sources.present)
    if not is_complete:
        state = {name: {k: v for k, v in part.items() if not _is_of_adapter(v)} for name, part in state.items()}
    resized = ask_for_stored(state, chunks, sources.present, MODEL_PREFIX) if resizes_positions else []
    _check_sources(sources, state)
    loaded = _read_model(sources, state)
    resize_loaded(loaded, resized)
    _fill_model(chunks, loaded, is_complete=is_complete)
    return is_complete


def load_all(checkpoint: Path, chunks: Sequence[MegatronModule], optimizer: MegatronOptimizer) -> int:
    """Load this rank's weights and optimizer state from a checkpoint saved at any layout, and from its base.

    Returns:
        The number of extra states of modules, such as FP8 scales, that were loaded.

    Raises:
        CheckpointError: as for `load_model`, or another set of weights learns than when the checkpoint was saved.
    """
    sources = _open_sources(checkpoint)
    _check_optimizer(checkpoint)
    state = describe_model(chunks, sources.present)
    _check_learning(sources, state)
    whole = {**state, OPTIMIZER_KEY: describe_optimizer(optimizer, state)}
    _check_sources(sources, whole)
    num_objects = sum(isinstance(value, ShardedObject) for value in nested_values(state))
    held = {name: part.data for name, part in whole[OPTIMIZER_KEY].get("state", {}).items()}
    loaded = _read_model(sources, whole)
    _fill_model(chunks, loaded)
    fill_optimizer(held, loaded[OPTIMIZER_KEY].get("state", {}))
    set_step_count(optimizer, loaded[OPTIMIZER_KEY][STEP])
    return num_objects


@dataclass(frozen=True, slots=True)
class _Sources:
    """A checkpoint, then its bases, and what each holds, by key: tensors without data, and objects."""

    folders: Sequence[Path]
    indexes: Sequence[Mapping[str, ShardedBase]]

    @property
    def present(self) -> Mapping[str, ShardedBase]:
        """What all hold together; the first that holds a tensor counts."""
        return ChainMap(*(dict(index) for index in self.indexes))

    def holder(self, value: Any) -> int:
        """Return the position of the folder to read a value from; 0 if none has it."""
        keys = _keys_of(value)
        found = (number for number, index in enumerate(self.indexes) if all(key in index for key in keys))
        return next(found, 0)


def _open_sources(checkpoint: Path) -> _Sources:
    folders = with_bases(checkpoint)
    return _Sources(folders, [_read_index(folder) for folder in folders])


def _keys_of(value: Any) -> list[str]:
    if isinstance(value, ShardedObject):
        return [value.unique_key]
    return [tensor.key for tensor in _tensors_of(value)]


def _is_of_adapter(value: Any) -> bool:
    return not isinstance(value, ShardedObject) and is_of_adapter(value.data)


def _has_adapter(state: dict[str, Any], present: Mapping[str, ShardedBase]) -> bool:
    """Return whether the checkpoint has any weight of the adapter; all ranks return the same."""
    mine = [key for value in nested_values(state) if _is_of_adapter(value) for key in _keys_of(value)]
    # A rank without weights of the adapter has no say.
    says = torch.tensor([not mine or any(key in present for key in mine), not mine], device=_device()).int()
    number = says.new_tensor(torch.distributed.get_world_size())
    torch.distributed.all_reduce(says)
    return bool(says[0] > says[1]) or bool(says[1] == number)


def _device() -> int | torch.device:
    return torch.cuda.current_device()


def _check_learning(sources: _Sources, state: dict[str, Any]) -> None:
    """Check that a checkpoint with a base holds exactly the weights that learn now: only they will be saved again."""
    if len(sources.folders) == 1:
        return
    for value in nested_values(state):
        if isinstance(value, ShardedObject) or _stays_in_base(value) == (sources.holder(value) > 0):
            continue
        now = "does not learn now and did" if _stays_in_base(value) else "learns now and did not"
        raise CheckpointError(
            f"tensor {_keys_of(value)[0]} {now} when the checkpoint was saved",
            where=str(sources.folders[0]),
            fix="restore training.freeze, or name the checkpoint in checkpoint.load_weights and train in another "
            "run_dir",
        )


def _check_sources(sources: _Sources, state: dict[str, Any]) -> None:
    """Check that every tensor of the state is there, and that the model has all that the run with the adapter learned.

    Raises:
        CheckpointError: names the first tensor that is missing, has another shape, or is not in the model.
    """
    check_tensors(sources.folders[0], state, sources.present)
    if len(sources.folders) == 1:
        return
    mine = sorted({key for value in nested_values(state) for key in _keys_of(value)})
    gathered: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, mine)
    wanted = {key for keys in gathered for key in keys}
    for folder, index in zip(sources.folders[:-1], sources.indexes[:-1], strict=True):
        unknown = [key for key, held in index.items() if isinstance(held, ShardedTensor) and _is_unknown(key, wanted)]
        if unknown:
            raise CheckpointError(
                f"the model has no tensor {unknown[0]}, which the checkpoint has learned",
                where=str(folder),
                fix="set the model.adapter of the checkpoint's config.yaml, or export the model and import it again",
            )


def _is_unknown(key: str, wanted: Container[str]) -> bool:
    return key.startswith(MODEL_PREFIX) and key not in wanted


def _read_model(sources: _Sources, state: dict[str, Any]) -> dict[str, Any]:
    """Read each part of the state from the folder that holds it; all ranks call it together."""
    merged: dict[str, Any] = {}
    for number, folder in enumerate(sources.folders):
        wanted = {
            name: part if name == OPTIMIZER_KEY else {k: v for k, v in part.items() if sources.holder(v) == number}
            for name, part in state.items()
            if name != OPTIMIZER_KEY or number == 0
        }
        loaded = read_state(wanted, folder)
        for name in wanted:
            merged.setdefault(name, {}).update(loaded.get(name, {}))
    return merged


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
            theirs, ours = list(found.global_shape), list(tensor.global_shape)
            if theirs != ours:
                # Which rows a vocabulary is padded to depends on the version, too.
                is_rows = tensor.key.endswith(_VOCABULARIES) and theirs[1:] == ours[1:]
                raise CheckpointError(
                    f"tensor {tensor.key} has shape {theirs} in the checkpoint, {ours} in the model",
                    where=str(checkpoint),
                    fix=_FIX_SHAPE + (_FIX_ROWS if is_rows else ""),
                )


def _tensors_of(value: Any) -> list[ShardedTensor]:
    if isinstance(value, ShardedTensorFactory):
        return [tensor for tensor in nested_values(value.build()) if isinstance(tensor, ShardedTensor)]
    return [value] if isinstance(value, ShardedTensor) else []


def _fill_model(chunks: Sequence[MegatronModule], loaded: dict[str, Any], *, is_complete: bool = True) -> None:
    for index, chunk in enumerate(chunks):
        weights = {key.removeprefix(MODEL_PREFIX): value for key, value in loaded.get(f"model{index}", {}).items()}
        result = chunk.load_state_dict(weights, strict=False)
        added = set() if is_complete else {name for name, weight in chunk.named_parameters() if is_of_adapter(weight)}
        missing = [key for key in result.missing_keys if not key.endswith("_extra_state") and key not in added]
        if missing or result.unexpected_keys:
            raise RuntimeError(f"the state of the model and the checkpoint differ: {missing} {result.unexpected_keys}")
