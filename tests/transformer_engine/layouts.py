"""Layouts of the examples and of what `plan --layouts` weighs, and the ranks of a job that is not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vlm.config import ModelConfig, ParallelConfig
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel.groups import build_groups, seed_everything, stop_distributed
from tests.support.configs import tiny_model

BF16 = Computation(precision="bf16")
SIZES = [(tp, pp, vp) for tp in (1, 2, 4, 8) for pp, vp in ((1, None), (2, None), (2, 2), (4, None), (4, 2))]


def layout(tp: int, pp: int = 1, vp: int | None = None, **settings: object) -> ParallelConfig:
    """Return a layout with sequence parallelism where there is tensor parallelism, as in the examples."""
    return ParallelConfig(
        **{
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "virtual_pipeline_model_parallel_size": vp,
            "overlap_p2p_comm": vp is not None,
            "sequence_parallel": tp > 1,
            **settings,
        }
    )


def name(parallel: ParallelConfig) -> str:
    """Return a short name for the test's id."""
    sizes = f"tp{parallel.tensor_model_parallel_size}_pp{parallel.pipeline_model_parallel_size}"
    virtual = parallel.virtual_pipeline_model_parallel_size
    first = parallel.num_layers_in_first_pipeline_stage
    return sizes + (f"_vp{virtual}" if virtual else "") + (f"_first{first}" if first else "")


def wide_model(**language: object) -> ModelConfig:
    """Return a tiny model whose heads and layers divide by every layout here."""
    return tiny_model(**{"num_layers": 8, "num_attention_heads": 8, "num_query_groups": 8, **language})


def ranks_of_every_stage(parallel: ParallelConfig) -> list[tuple[int, int]]:
    """Return (rank, world size) of the last tensor-parallel rank of each stage of a job of two data-parallel ranks."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    # megatron-core's order: tensor-parallel ranks are neighbours, then data-parallel ones, then stages.
    return [(stage * 2 * tp + tp - 1, 2 * tp * pp) for stage in range(pp)]


@contextmanager
def fake_rank(parallel: ParallelConfig, rank: int = 0, world_size: int = 1) -> Iterator[None]:
    """Be one rank of a job whose other ranks are not there."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        build_groups(parallel)
        yield
    finally:
        stop_distributed()


def build(
    parallel: ParallelConfig, backend: str, computation: Computation = BF16, model: ModelConfig | None = None
) -> list[VisionLanguageModel]:
    """Build the chunks of this rank, with the same random numbers each time."""
    seed_everything(7)
    return build_model(replace(model or wide_model(), backend=backend), parallel, computation)
