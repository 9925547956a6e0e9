"""Position embeddings of another image size: read as they are stored, then interpolated to those of the model."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from megatron.core.transformer.module import MegatronModule

from megatron_vlm.models.layers.position_embeddings import Resizable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Resized:
    """A weight whose shape in the checkpoint is that of another image size."""

    chunk: str
    """Its chunk and its key in the state of the model."""
    key: str
    module: Resizable
    stored: ShardedTensor
    """What is read in its place."""


def ask_for_stored(
    state: dict[str, dict[str, Any]], chunks: Sequence[MegatronModule], present: Mapping[str, ShardedBase], prefix: str
) -> list[Resized]:
    """Let `state` ask for weights of another image size as they are stored; no other rank is asked.

    Args:
        state: of `describe_model`; changed in place.
        chunks: of this rank.
        present: what the checkpoint holds, by key.
        prefix: of the keys in the state of a chunk.

    Returns:
        What must be interpolated after reading.
    """
    found = [entry for index, chunk in enumerate(chunks) for entry in _of_chunk(index, chunk, state, present, prefix)]
    for entry in found:
        state[entry.chunk][entry.key] = entry.stored
    return found


def resize_loaded(loaded: dict[str, dict[str, Any]], resized: Sequence[Resized]) -> None:
    """Interpolate what was read; `loaded` is changed in place."""
    for entry in resized:
        weight = entry.module.resize(loaded[entry.chunk][entry.key])
        loaded[entry.chunk][entry.key] = weight
        logger.info(
            "%s is interpolated for another image size, from %s to %s",
            entry.stored.key,
            list(entry.stored.global_shape),
            list(weight.shape),
        )


def _of_chunk(
    index: int, chunk: MegatronModule, state: dict[str, Any], present: Mapping[str, ShardedBase], prefix: str
) -> Iterator[Resized]:
    for name, module in chunk.named_modules():
        if not isinstance(module, Resizable):
            continue
        chunk_name, key = f"model{index}", f"{prefix}{name}.weight"
        wanted = state[chunk_name][key]
        stored = present.get(wanted.key)
        if not isinstance(stored, ShardedTensor) or stored.global_shape == wanted.global_shape:
            continue
        if module.can_resize(tuple(stored.global_shape)):
            # In the stored type: the interpolation comes before any rounding to that of the model.
            empty = torch.empty(stored.global_shape, dtype=stored.dtype, device=wanted.data.device)
            whole = ShardedTensor.from_rank_offsets(wanted.key, empty, replica_id=wanted.replica_id)
            yield Resized(chunk_name, key, module, whole)
