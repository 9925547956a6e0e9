"""Parts that every rank holds whole: the tower and the projection."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

ProcessGroup = torch.distributed.ProcessGroup


@dataclass(frozen=True, slots=True)
class ReplicaGroups:
    """Process groups of a part that every rank holds whole."""

    own: ProcessGroup
    """Only this rank; passed to megatron-core's layers as their tensor-parallel group."""
    replicas: ProcessGroup
    """All ranks with the same part; a checkpoint stores it once for all of them."""


def replica_groups() -> ReplicaGroups:
    """Create the groups of this rank; needs megatron-core's parallel state."""
    # Local synchronisation: the other ranks do not take part in creating a group of one.
    own = torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
    return ReplicaGroups(own, parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))


class Replicated(MegatronModule):
    """A module that every rank holds whole; `__init__` must set `groups`, and `tp_group` for megatron-core."""

    groups: ReplicaGroups

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the state for a checkpoint, which stores one copy for all replicas."""
        metadata = {**(metadata or {}), "dp_cp_group": self.groups.replicas}
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)


def mark_replicated(module: torch.nn.Module) -> None:
    """Mark the parameters of a module that is whole on every tensor-parallel rank but sees different images on each.

    `finish_gradients` then averages their gradients over these ranks, and megatron-core counts each parameter once in
    the gradient norm.
    """
    for parameter in module.parameters():
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        parameter.sequence_parallel = False  # type: ignore[attr-defined]
        parameter.is_replicated = True  # type: ignore[attr-defined]
