"""Start and stop the process groups of a job, and locate this rank in them."""

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_vlm.config import ParallelConfig
from megatron_vlm.parallel.slicing import ContextShare, ImageShare
from megatron_vlm.platform.device import distributed_backend


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLayout:
    """Position of this rank in the parallel layout."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    """Data-parallel ranks have different rows; context-parallel ranks share theirs and do not count as such."""

    def image_share(self, *, vision_tensor_parallel: bool = False) -> ImageShare:
        """Return the images of a micro-batch that this rank encodes, if it holds the tower.

        Ranks count along the tensor-parallel group first, as in megatron-core's tensor- and context-parallel group.

        Args:
            vision_tensor_parallel: the tower is split, so that tensor-parallel ranks encode the same images.
        """
        if vision_tensor_parallel:
            return ImageShare(self.cp_rank, self.cp_size)
        return ImageShare(self.cp_rank * self.tp_size + self.tp_rank, self.tp_size * self.cp_size)

    @property
    def context_share(self) -> ContextShare:
        """The positions of a micro-batch that this rank computes."""
        return ContextShare(self.cp_rank, self.cp_size)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the vision tower."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pp_rank == self.pp_size - 1

    def describe(self) -> str:
        """Return a short name for messages."""
        context = f", cp {self.cp_rank}" if self.cp_size > 1 else ""
        return f"rank {self.rank}: dp {self.dp_rank}, pp {self.pp_rank}, tp {self.tp_rank}{context}"


def start_distributed(parallel: ParallelConfig, device: torch.device, backend: str | None = None) -> RankLayout:
    """Join the job and build megatron-core's process groups.

    Args:
        parallel: sizes of the model-parallel groups.
        device: as returned by `prepare_process`.
        backend: collective library; None: the default of the device.
    """
    if not torch.distributed.is_initialized():
        timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
        # Without `device_id`: it would bind the group to a device, and NCCL would split new groups from it, which all
        # ranks must do together; `models.layers.replicas.replica_groups` makes groups of one on the first stage only.
        torch.distributed.init_process_group(backend or distributed_backend(device), timeout=timeout)
    build_groups(parallel)
    return rank_layout()


def build_groups(parallel: ParallelConfig) -> None:
    """Build megatron-core's groups in a running job, replacing groups of another layout."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.num_model_chunks,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        # A second set of gloo groups is only needed for checkpoints that gather the optimizer on one rank.
        create_gloo_process_groups=False,
    )


def rank_layout() -> RankLayout:
    """Return the position of this rank in megatron-core's groups."""
    return RankLayout(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
    )


@contextmanager
def single_process() -> Iterator[None]:
    """Be a job of one rank for megatron-core and torch's checkpoint reader; a running job is used as it is."""
    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        stop_distributed()


def stop_distributed() -> None:
    """Leave the job; safe to call twice."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seed torch's generators, including those of tensor-parallel regions.

    If the seed is a function of (run seed, iteration), so is the random state, and an exact resume needs no saved
    state.
    """
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
