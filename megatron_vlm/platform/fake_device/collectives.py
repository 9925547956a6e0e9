"""Record the calls of process groups, as c10d's operators see them."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlm.platform.fake_device.callers import caller
from megatron_vlm.platform.fake_device.events import Collective, Group

_FIRST_IS_OUTPUT = {
    "_allgather_base_": 1,
    "_reduce_scatter_base_": 1,
    "allgather_": 1,
    "alltoall_": 1,
    "alltoall_base_": 1,
    "reduce_scatter_": 1,
}
"""Operators whose first argument is the output, and the place of what is sent."""
_MESSAGES = {"send": "send", "recv_": "recv", "recv_any_source_": "recv"}
_ROOTED = ("broadcast_", "reduce_", "gather_", "scatter_")


class Collectives:
    """The calls of this process, in their order."""

    def __init__(self) -> None:
        self.calls: list[Collective] = []
        self._groups: dict[str, Group] = {}

    def note(self, name: str, args: tuple[Any, ...]) -> None:
        """Record a call of the operator `c10d::<name>`."""
        boxed = next((value for value in args if isinstance(value, torch.ScriptObject)), None)
        if boxed is None:
            return
        try:
            process_group: Any = dist.ProcessGroup.unbox(boxed)
        except RuntimeError:  # another object, such as a reduction
            return
        group = self._group(process_group)
        tensors = list(_tensors(args[_FIRST_IS_OUTPUT.get(name, 0)]))
        self.calls.append(
            Collective(
                op=_MESSAGES.get(name, name.strip("_").removesuffix("_base").replace("_base", "")),
                group=group,
                dtype=str(tensors[0].dtype).removeprefix("torch.") if tensors else "",
                sizes=tuple(tensor.numel() for tensor in tensors),
                where=caller(),
                peer=_peer(name, args, group),
            )
        )

    def note_object(self, op: str, process_group: Any) -> None:
        """Record a collective of Python objects."""
        group = self._group(process_group or dist.group.WORLD)
        self.calls.append(Collective(op=op, group=group, dtype="object", sizes=(), where=caller()))

    def _group(self, process_group: Any) -> Group:
        name = process_group.group_name
        if name not in self._groups:
            registered = dist.distributed_c10d._resolve_process_group(name)
            ranks = tuple(sorted(dist.get_process_group_ranks(registered)))
            self._groups[name] = Group(_readable(process_group.group_desc), ranks)
        return self._groups[name]


def _readable(description: str) -> str:
    """Return "tensor model parallel" for TENSOR_MODEL_PARALLEL_GROUP."""
    words = description.replace("_GROUP", "").replace("_", " ").lower()
    return {"default pg": "all ranks", "undefined": "unnamed group"}.get(words, words)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def _peer(name: str, args: tuple[Any, ...], group: Group) -> int | None:
    """Return the other rank of a message, or the root of a rooted collective; ranks of the job."""
    if name not in _MESSAGES and name not in _ROOTED:
        return None
    numbers = [value for value in args if isinstance(value, int) and not isinstance(value, bool)]
    return group.ranks[numbers[0]] if numbers else None
