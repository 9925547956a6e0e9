"""Write tensors to a checkpoint one at a time, each made while the one before is written: memory holds two at most.

megatron-core's own writer takes a state dict of finished tensors. The files written here have the same names, order
and bytes, so megatron-core loads them like its own.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint import ChunkStorageMetadata, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_vlm.checkpoint.item_files import checksummed, split_items, write_item
from megatron_vlm.checkpoint.manifest import FileRecord, checksum_file
from megatron_vlm.config import CheckpointError
from megatron_vlm.platform.ahead import ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyTensor:
    """A tensor to be written, made on demand."""

    shape: tuple[int, ...]
    """Shape of the whole tensor; layers are stacked along the first axis."""
    dtype: torch.dtype
    is_stacked: bool
    """Whether it stacks layers. A checkpoint stores each layer separately, so that a rank reads only its own."""
    make: Callable[[int | None], Tensor]
    """Return the values of one layer, without the layer axis, or for None those of the whole tensor."""

    @property
    def layers(self) -> tuple[int | None, ...]:
        """The arguments that `make` is called with."""
        return tuple(range(self.shape[0])) if self.is_stacked else (None,)


def save_lazily(
    tensors: Mapping[str, LazyTensor], folder: Path, report: Callable[[], object] = lambda: None
) -> dict[str, FileRecord]:
    """Write tensors into an empty folder that megatron-core can load; this process is a job of one rank.

    Args:
        tensors: by key.
        folder: exists and is empty.
        report: called after each tensor; for a tensor that stacks layers, after each layer.

    Returns:
        Size and checksum of each file of values, by its name.

    Raises:
        CheckpointError: a tensor does not have the announced shape or type, or a file reads back differently.
        OSError: a file cannot be written.
    """
    strategy = _LazyStrategy(tensors, report)
    dist_checkpointing.save({}, str(folder), sharded_strategy=strategy)
    return strategy.records


class _LazyStrategy(SaveShardedStrategy):
    """Write the tensors given to the constructor; megatron-core writes the rest of the checkpoint."""

    def __init__(self, tensors: Mapping[str, LazyTensor], report: Callable[[], object]) -> None:
        super().__init__("torch_dist", 1)
        self._tensors, self._report = tensors, report
        self.records: dict[str, FileRecord] = {}

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Trivially: there are none."""
        return True

    def save(self, sharded_state_dict: object, checkpoint_dir: str | Path) -> None:
        """Write the files and their index."""
        items = [item for key, tensor in self._tensors.items() for item in _write_items(key, tensor)]
        (plan,), metadata = create_default_global_save_plan([SavePlan(items)])
        results: list[WriteResult] = []
        # A file is read back while the next one is written.
        with ThreadPoolExecutor(1) as reader:
            checks = []
            for number, bucket in enumerate(split_items(plan)):
                path = Path(checkpoint_dir) / f"__0_{number}.distcp"
                results += self._write_file(path, bucket)
                checks.append(reader.submit(self._read_back, path))
            for check in checks:
                check.result()
        writer = FileSystemWriter(checkpoint_dir)
        writer.save_id = ""  # a random number: the same tensors would not give the same files
        writer.finish(metadata, [results])

    def _write_file(self, path: Path, items: list[WriteItem]) -> Iterator[WriteResult]:
        with checksummed(path, is_cached=False) as stream:
            tensors = ahead(map(self._make, items))
            for item in items:
                yield write_item(stream, path.name, item, next(tensors))
                self._report()
        self.records[path.name] = stream.record

    def _read_back(self, path: Path) -> None:
        if checksum_file(path, is_cached=False) != self.records[path.name]:
            raise CheckpointError(
                "file reads back with other bytes than were written",
                where=str(path),
                fix="check the disk, then try again",
            )

    def _make(self, item: WriteItem) -> Tensor:
        key, data = item.index.fqn, item.tensor_data
        lazy = self._tensors[key]
        assert data is not None
        made = lazy.make(data.chunk.offsets[0])[None] if lazy.is_stacked else lazy.make(None)
        if made.shape != data.chunk.sizes or made.dtype != lazy.dtype:
            raise CheckpointError(
                f"tensor {key} is {list(made.shape)} {made.dtype}, announced as {list(data.chunk.sizes)} {lazy.dtype}",
                fix="check that the source's config is that of its weights; if it is, report the table of names",
            )
        return made.contiguous()


def _write_items(key: str, tensor: LazyTensor) -> Iterator[WriteItem]:
    sizes = torch.Size((1, *tensor.shape[1:]) if tensor.is_stacked else tensor.shape)
    for layer in tensor.layers:
        offsets = torch.Size(0 if axis else layer or 0 for axis in range(len(sizes)))
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=tensor.dtype),
            size=torch.Size(tensor.shape),
        )
        yield WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=data)
