"""How long a run takes and how much of that time its ranks are idle, from the settings alone."""

from megatron_vlm.config import Layout, ParallelConfig


def gpu_hours(flops: float, flops_per_second: float) -> float:
    """Return the GPU hours of so many operations at so many useful ones per second and GPU."""
    return flops / flops_per_second / 3600


def pipeline_bubble(parallel: ParallelConfig, layout: Layout) -> float:
    """Return the share of a step in which a pipeline stage waits for the others, if all stages take equally long.

    Source: Narayanan et al., arXiv:2104.04473, section 2.2.
    """
    pp, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    return (pp - 1) / (layout.num_micro_batches * chunks + pp - 1)


def stage_imbalance(stage_shares: tuple[float, ...]) -> float:
    """Return how much longer than the mean the slowest stage takes, from each stage's share of the operations."""
    return max(stage_shares) * len(stage_shares) - 1
