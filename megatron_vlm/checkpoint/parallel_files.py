"""Write and read a checkpoint with all ranks at work: each byte is written once and read once.

What several data-parallel ranks hold alike (weights, the state of a plain optimizer) is dealt out among them; when
loading, they pass each other what they have read.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.storage import WriteResult

from megatron_vlm.checkpoint.item_files import NUM_FILES, checksummed, split_items, write_items
from megatron_vlm.checkpoint.manifest import FileRecord
from megatron_vlm.checkpoint.watched_path import WatchedPath
from megatron_vlm.config import CheckpointError

STATE_PREFIX = "optimizer.state"
"""Of the names of the optimizer's tensors."""
_BYTES_BESIDE = 4096
"""Of an item: torch.save adds about 1,600 bytes, its place in the index takes a few hundred."""
STATE_BYTES = 12
"""Of a parameter that learns: its value and both moments in float32."""


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """What a rank has written."""

    plan: SavePlan
    results: list[WriteResult]
    files: dict[str, FileRecord]


class RankPart:
    """What this rank writes of a checkpoint, for which no other rank is asked any more.

    megatron-core's writer forks processes and waits for them: for ever, if one is killed. torch's loses the errors of
    its second thread, and with them tensors. The files are the same. Files and places are planned when they are first
    asked for: in the thread that writes, not in the one that trains.
    """

    def __init__(self, mine: dict[str, list[ShardedBase]], common: dict[str, Any]) -> None:
        self._mine, self._common = mine, common
        self._tensors = [value for values in mine.values() for value in values if isinstance(value, ShardedTensor)]

    @cached_property
    def _planner(self) -> MCoreSavePlanner:
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        is_coordinator = torch.distributed.get_rank() == 0
        planner.set_up_planner(mcore_to_pyt_state_dict(self._mine), is_coordinator=is_coordinator)
        return planner

    @cached_property
    def _plan(self) -> SavePlan:
        return self._planner.create_local_plan()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by key; of a key with several, such as layers, by key and place."""
        return {f"{value.key} {list(value.global_offset)}": value.data for value in self._tensors}

    @property
    def num_bytes(self) -> int:
        """Of the tensors, and at most of what their files and the index have for each beside its values."""
        return sum(value.data.nbytes for value in self._tensors) + len(self._plan.items) * _BYTES_BESIDE

    def write(self, folder: Path, get_on: Callable[[], object] | None = None) -> WrittenPart:
        """Write the files of this rank.

        Args:
            folder: of the checkpoint.
            get_on: called from several threads, after each block that was written; None: nobody watches.

        Raises:
            OSError: names the file that cannot be written.
        """
        rank = torch.distributed.get_rank()
        buckets = {f"__{rank}_{number}.distcp": items for number, items in enumerate(split_items(self._plan))}
        with ThreadPoolExecutor(NUM_FILES) as threads:
            written = list(
                threads.map(
                    lambda name: write_items(folder / name, buckets[name], self._planner.resolve_data, get_on), buckets
                )
            )
        files = {name: record for name, (_, record) in zip(buckets, written, strict=True)}
        return WrittenPart(self._plan, [result for results, _ in written for result in results], files)

    def complete(self, folder: Path, parts: Sequence[WrittenPart]) -> None:
        """Write what megatron-core reads first: the index of all tensors, and what is no tensor; on one rank.

        Args:
            folder: of the checkpoint.
            parts: of all ranks, in their order.

        Raises:
            OSError: names the file that cannot be written.
        """
        _, metadata = self._planner.create_global_plan([part.plan for part in parts])
        FileSystemWriter(folder).finish(metadata, [part.results for part in parts])
        with checksummed(folder / COMMON_STATE_FNAME) as stream:
            torch.save(self._common, cast(BinaryIO, stream))
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def plan_part(
    state: dict[str, Any],
    metadata: dict[str, Any],
    stage: Callable[[list[ShardedTensor]], object] = lambda tensors: None,
) -> RankPart:
    """Deal out the sharded state of all ranks among them; all ranks call it together.

    Args:
        state: as `describe` returns it.
        metadata: how megatron-core named the tensors.
        stage: called with the tensors that this rank will write; may replace their data by copies.
    """
    sharded, common = save_preprocess({**state, "content_metadata": metadata})
    group = _data_parallel_group()
    distribution = determine_main_replica_uniform_distribution(sharded, group)
    distribute_main_replicas_with_precomputed_distribution(sharded, group, distribution)
    mine: dict[str, list[ShardedBase]] = defaultdict(list)
    for value in nested_values(sharded):
        if is_main_replica(value.replica_id):
            mine[value.unique_key if isinstance(value, ShardedObject) else value.key].append(value)
    stage([value for values in mine.values() for value in values if isinstance(value, ShardedTensor)])
    return RankPart(mine, common)


class _WatchedLoad(FullyParallelLoadStrategyWrapper):
    """Has megatron-core's strategies read from files that are watched."""

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> dict[str, Any]:
        return super().load(sharded_state_dict, WatchedPath(checkpoint_dir))


def read_state(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Read what `state` describes and return it; all ranks call it together.

    A tensor that this rank reads itself is read in place. Whatever is read gives a sign of life.

    Raises:
        CheckpointError: a file holds something other than its index says.
    """
    base = get_default_load_sharded_strategy(str(checkpoint))
    strategy = _WatchedLoad(base, _data_parallel_group())
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
