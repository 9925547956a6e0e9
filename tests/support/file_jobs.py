"""What ranks do in tests of what each of them writes and reads."""

from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from unittest import mock

import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_vlm.checkpoint.background import BackgroundSaves
from megatron_vlm.checkpoint.folder import list_iterations
from megatron_vlm.checkpoint.parallel_files import bytes_per_rank
from megatron_vlm.checkpoint.save import save_checkpoint
from megatron_vlm.checkpoint.sharded_state import describe, load_all
from megatron_vlm.config import StorageError, TrainConfig
from tests.support.jobs import start
from tests.support.small_disk import files_of_at_most


@dataclass(frozen=True)
class Share:
    """Bytes of one rank, and of all."""

    num_announced: int
    """What `bytes_per_rank` says."""
    num_written: int
    """Of tensors."""
    num_in_all: int
    """Of the tensors of the checkpoint."""
    num_read: int
    """Of the files, headers of the tensors included."""
    num_stored: int
    """In the files, headers of the tensors included."""
    largest: int
    """Of one tensor that is dealt out."""


def save_and_read(config: TrainConfig) -> Share:
    """Save a new run and load it again."""
    state = start(config)
    described = describe(state.chunks, state.optimizer)
    announced = bytes_per_rank(described)
    folder = save_checkpoint(config, state.chunks, state.optimizer, state.progress())
    metadata = FileSystemReader(folder).read_metadata()
    files = {index: info.relative_path for index, info in metadata.storage_data.items()}
    written, sizes = 0, []
    for key, tensor in metadata.state_dict_metadata.items():
        for chunk in tensor.chunks:
            size = prod(chunk.sizes) * tensor.properties.dtype.itemsize
            file = next(f for index, f in files.items() if index.fqn == key and index.offset == chunk.offsets)
            sizes.append(size)
            written += size * file.startswith(f"__{torch.distributed.get_rank()}_")
    lengths = []

    def read_data(self, plan, planner, read_data=FileSystemReader.read_data):
        lengths.extend(
            {item.storage_index: self.storage_data[item.storage_index].length for item in plan.items}.values()
        )
        return read_data(self, plan, planner)

    with mock.patch.object(FileSystemReader, "read_data", read_data):
        load_all(folder, state.chunks, state.optimizer)
    stored = sum(info.length for info in metadata.storage_data.values())
    return Share(announced, written, sum(sizes), sum(lengths), stored, max(sizes))


def save_on_a_full_disk(config: TrainConfig, is_async: bool) -> tuple[str, list[int]]:
    """Save twice, the first time with a last rank that cannot write; return its error and what is there at the end."""
    state, saves, error = start(config), BackgroundSaves(), ""
    is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    for iteration, is_full in ((1, True), (2, False)):
        state.iteration = iteration
        what = (config, state.chunks, state.optimizer, state.progress())
        with files_of_at_most(1000) if is_full and is_last else nullcontext():
            try:
                if is_async:
                    saves.start(*what)
                    saves.wait()
                else:
                    save_checkpoint(*what)
            except StorageError as caught:
                error = str(caught)
    return error, list_iterations(config.run_dir)
