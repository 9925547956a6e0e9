"""Write and read a checkpoint with all ranks at work: each byte is written once and read once.

What several data-parallel ranks hold alike (weights, the state of a plain optimizer) is dealt out among them; when
loading, they pass each other what they have read.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as write_together
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vlm.config import CheckpointError

_NUM_THREADS = 2
"""Threads of a rank that write, each to its own file."""
STATE_PREFIX = "optimizer.state"
"""Of the names of the optimizer's tensors."""
STATE_BYTES = 12
"""Of a parameter that learns: its value and both moments in float32."""


class DirectWriter(SaveShardedStrategy):
    """Writes this rank's part from its own process.

    megatron-core's writer forks processes and waits for them: for ever, if one is killed. The files are the same.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    @property
    def can_handle_sharded_objects(self) -> bool:
        """They are written to the same files."""
        return True

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Write the tensors and objects whose main copy this rank has; all ranks call it together."""
        mine: dict[str, list[ShardedBase]] = defaultdict(list)
        for value in nested_values(sharded_state_dict):
            if is_main_replica(value.replica_id):
                mine[value.unique_key if isinstance(value, ShardedObject) else value.key].append(value)
        write_together(
            mcore_to_pyt_state_dict(mine),
            storage_writer=FileSystemWriter(checkpoint_dir, thread_count=_NUM_THREADS),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def write_state(state: dict[str, Any], folder: Path, metadata: dict[str, Any]) -> None:
    """Write the sharded state of all ranks to an empty folder; all ranks call it together.

    Raises:
        torch.distributed.checkpoint.api.CheckpointException: a rank failed; every rank raises it.
    """
    strategy = FullyParallelSaveStrategyWrapper(DirectWriter(), _data_parallel_group())
    dist_checkpointing.save(state, str(folder), strategy, content_metadata=metadata)


def read_state(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Read what `state` describes and return it; all ranks call it together.

    A tensor that this rank reads itself is read in place.

    Raises:
        CheckpointError: a file holds something other than its index says.
    """
    base = get_default_load_sharded_strategy(str(checkpoint))
    strategy = FullyParallelLoadStrategyWrapper(base, _data_parallel_group())
    with readable(checkpoint):
        return dist_checkpointing.load(state, str(checkpoint), strategy)


@contextmanager
def readable(checkpoint: Path) -> Iterator[None]:
    """Say in one line that the values of a checkpoint cannot be read.

    Raises:
        CheckpointError: torch's reader failed on a rank; every rank raises it.
    """
    try:
        yield
    except CheckpointException as error:  # a BaseException
        cause = next((cause for cause, _ in error.failures.values()), error)
        reason = next(iter(str(cause).splitlines()), "")[:120]
        raise CheckpointError(
            f"values cannot be read: {type(cause).__name__}: {reason}",
            where=str(checkpoint),
            fix="use another checkpoint, or copy this one again",
        ) from None


def _data_parallel_group() -> torch.distributed.ProcessGroup:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def bytes_per_rank(state: dict[str, Any]) -> int:
    """Return the bytes of tensors that this rank writes of `describe(...)`; nothing is written and no rank asked.

    A rank writes what it alone owns; then weights are dealt out so that data-parallel ranks write alike, to within the
    largest tensor. Where a peer owns more than an even share, this rank writes less than the result. Of the parts that
    tensor-parallel ranks hold alike, such as the tower, only the first of them writes, weights and optimizer.
    """
    owned = in_all = 0
    for value in nested_values(state):
        if not isinstance(value, ShardedBase) or not isinstance(value.data, torch.Tensor):
            continue
        if value.key.startswith(STATE_PREFIX):
            owned += value.data.nbytes if is_main_replica(value.replica_id) and not value.has_regular_grid else 0
        elif _is_of_first_copies(value):
            in_all += value.data.nbytes
            in_all += value.data.numel() * STATE_BYTES if value.data.requires_grad else 0
    return max(owned, -(-in_all // _data_parallel_group().size()))


def _is_of_first_copies(value: ShardedBase) -> bool:
    """Return whether this rank's data-parallel peers, not those of another tensor-parallel rank, write the value."""
    is_cut = getattr(value.data, "tensor_model_parallel", False)
    is_first = is_cut or parallel_state.get_tensor_model_parallel_rank() == 0
    return is_first and is_main_replica(value.replica_id[:-1])
