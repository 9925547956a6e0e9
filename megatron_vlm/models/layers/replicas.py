"""Parts that are whole on every rank: the tower and the projection."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

ProcessGroup = torch.distributed.ProcessGroup


@dataclass(frozen=True, slots=True)
class ReplicaGroups:
    """Process groups of a part that is whole on every rank."""

    own: ProcessGroup
    """This rank only: its tensor-parallel group as megatron-core's layers see it."""
    replicas: ProcessGroup
    """All ranks that hold the same part; a checkpoint stores it once for them."""


def replica_groups() -> ReplicaGroups:
    """Return the groups of this rank; needs megatron-core's parallel state."""
    # The other ranks need not take part in making the group of one.
    own = torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
    return ReplicaGroups(own, parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))


class Replicated(MegatronModule):
    """A module that is whole on every rank; `__init__` sets `groups`, and `tp_group` for megatron-core."""

    groups: ReplicaGroups

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the checkpoint's view of the module, held once for all replicas."""
        metadata = {**(metadata or {}), "dp_cp_group": self.groups.replicas}
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)


def mark_replicated(module: torch.nn.Module) -> None:
    """Mark the parameters of a module that is whole on every tensor-parallel rank and sees other images on each.

    megatron-core then averages their gradients over these ranks and counts each once in the gradient norm.
    """
    for parameter in module.parameters():
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        parameter.sequence_parallel = False  # type: ignore[attr-defined]
        parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]
