"""Parts that every rank holds whole: the projection, and the tower where it is not split over ranks."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

ProcessGroup = torch.distributed.ProcessGroup


@dataclass(frozen=True, slots=True)
class ReplicaGroups:
    """Process groups of a vision part."""

    own: ProcessGroup
    """Only this rank."""
    tensor: ProcessGroup
    """Ranks that the part is split over; only this rank if it is whole. Passed to megatron-core's layers."""
    replicas: ProcessGroup
    """All ranks with the same weights; a checkpoint stores them once for all of them."""

    def split(self) -> "ReplicaGroups":
        """Return the groups of a part that is split over the tensor-parallel ranks."""
        return replace(
            self,
            tensor=parallel_state.get_tensor_model_parallel_group(),
            replicas=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )


def replica_groups() -> ReplicaGroups:
    """Create the groups of a part that this rank holds whole; needs megatron-core's parallel state."""
    # Local synchronisation: the other ranks do not take part in creating a group of one.
    own = torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
    return ReplicaGroups(own, own, parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))


class Replicated(MegatronModule):
    """A vision part; `__init__` must set `groups`, and `tp_group` for megatron-core."""

    groups: ReplicaGroups

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the state for a checkpoint, which stores one copy of all replicas."""
        metadata = {**(metadata or {}), "dp_cp_group": self.groups.replicas}
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)


def mark_replicated(module: torch.nn.Module, *, is_split: bool = False) -> None:
    """Mark the parameters of a vision part that are whole on every tensor-parallel rank.

    `finish_gradients` then averages their gradients over these ranks, and megatron-core counts each parameter once in
    the gradient norm. Where these ranks see different images, only the average is right. Where they see the same, it
    keeps their copies equal, even if each of them adds up in another order.

    Args:
        module: the part.
        is_split: whether megatron-core's marks of what is split are true: its layers set them for a group of one, too.
    """
    for parameter in module.parameters():
        if is_split and getattr(parameter, "tensor_model_parallel", False):
            continue
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        parameter.sequence_parallel = False  # type: ignore[attr-defined]
        parameter.is_replicated = True  # type: ignore[attr-defined]
