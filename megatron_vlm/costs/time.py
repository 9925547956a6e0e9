"""Duration of a run and idle time of its ranks."""

from megatron_vlm.config import Layout, ParallelConfig


def gpu_hours(flops: float, flops_per_second: float) -> float:
    """Return the GPU hours for `flops` operations at `flops_per_second` useful operations per GPU."""
    return flops / flops_per_second / 3600


def pipeline_bubble(parallel: ParallelConfig, layout: Layout) -> float:
    """Return the fraction of a step that a pipeline stage waits for others, if all stages take equally long.

    Source: Narayanan et al., arXiv:2104.04473, section 2.2.
    """
    pp, chunks = parallel.pipeline_model_parallel_size, parallel.num_model_chunks or 1
    return (pp - 1) / (layout.num_micro_batches * chunks + pp - 1)


def stage_imbalance(stage_fractions: tuple[float, ...]) -> float:
    """Return by how much the slowest stage exceeds the mean, from the fraction of the operations of each stage."""
    return max(stage_fractions) * len(stage_fractions) - 1
