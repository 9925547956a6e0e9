"""Predicted time of an optimizer step: micro-batches through the pipeline, gradients, optimizer."""

from dataclasses import asdict, dataclass

from megatron_vlm.config import Layout, TrainConfig
from megatron_vlm.costs.cluster import Cluster
from megatron_vlm.costs.flops import Work, step_flops
from megatron_vlm.costs.parameters import StageSize, stage_sizes
from megatron_vlm.costs.stage_time import Times, micro_batch_times

_GRADIENT_BYTES, _WEIGHT_BYTES = 4, 2
# AdamW reads gradient, FP32 weight and both moments, and writes all but the first and the BF16 weight; the norm and the
# clipping pass over the gradient three times.
_OPTIMIZER_BYTES = 30 + 12
# megatron-core's default size of a gradient bucket, in parameters and per data-parallel rank: the last bucket of a step
# is exchanged when nothing is left to hide it.
_BUCKET, _BUCKET_PER_RANK = 40e6, 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """A predicted step [s]."""

    slowest: int
    """The stage that the others wait for."""
    stages: tuple[float, ...]
    """A micro-batch on each stage."""
    spent: dict[str, float]
    """By what the slowest stage spends it on, for all micro-batches; with `bubble`, `data_parallel`, `optimizer`."""
    mfu: float
    """Useful operations over those of the GPUs' peak."""

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.spent.values())

    @property
    def imbalance(self) -> float:
        """By how much the slowest stage exceeds the mean."""
        return max(self.stages) * len(self.stages) / sum(self.stages) - 1


def predict_step(config: TrainConfig, layout: Layout, work: Work, cluster: Cluster) -> StepTime:
    """Predict the time of a step.

    Args:
        config: settings of the run.
        layout: ranks and micro-batches.
        work: mean contents of a micro-batch.
        cluster: where it runs.

    Raises:
        ConfigError: the number of patches depends on the image size.
    """
    parallel, sizes = config.parallel, stage_sizes(config)
    passes = [micro_batch_times(config, stage, work, cluster, layout.world_size) for stage in range(len(sizes))]
    stages = tuple(forward.total + backward.total for forward, backward in passes)
    slowest = stages.index(max(stages))
    in_steps = (passes[slowest][0] + passes[slowest][1]).times(layout.num_micro_batches)
    # The first micro-batch of a step reaches the slowest stage, and the last one leaves it, through all other stages.
    bubble = (sum(stages) - stages[slowest]) / (parallel.num_model_chunks or 1)
    exchanges = [_gradients(config, layout, cluster, stage, size, passes[stage]) for stage, size in enumerate(sizes)]
    updates = [_optimizer(config, layout, cluster, size) for size in sizes]
    spent = {**asdict(in_steps), "bubble": bubble, "data_parallel": max(exchanges), "optimizer": max(updates)}
    useful = (
        layout.num_micro_batches
        * layout.data_parallel_size
        * step_flops(config.model, config.training.freeze, work).total
    )
    peak = cluster.gpu.peak_flops * layout.world_size
    return StepTime(slowest=slowest, stages=stages, spent=spent, mfu=useful / (peak * sum(spent.values())))


def _gradients(
    config: TrainConfig, layout: Layout, cluster: Cluster, stage: int, size: StageSize, passes: tuple[Times, Times]
) -> float:
    """Return the time to reduce gradients and to gather weights that is not hidden."""
    parallel, ranks = config.parallel, layout.data_parallel_size * config.parallel.context_parallel_size
    learning = size.learning
    if not learning or ranks == 1:
        return 0.0
    stride = parallel.tensor_model_parallel_size
    reduce = cluster.exchange_seconds(_GRADIENT_BYTES * learning, ranks, stride=stride)
    if not parallel.use_distributed_optimizer:
        gather, reduce = 0.0, 2 * reduce
    else:
        gather = cluster.exchange_seconds(_WEIGHT_BYTES * learning, ranks, stride=stride)
    forward, backward = (one.total for one in passes)
    # The first stage has buckets. Each later stage has one, but ends earlier and starts later by what the stages before
    # it take.
    last = min(1.0, max(_BUCKET, _BUCKET_PER_RANK * ranks) / learning) if stage == 0 else 0.0
    hidden = (1 - last) if stage == 0 else stage
    if parallel.overlap_grad_reduce:
        reduce = max(reduce * last, reduce - backward * hidden)
    if parallel.overlap_param_gather:
        gather = max(gather * last, gather - forward * hidden)
    return reduce + gather


def _optimizer(config: TrainConfig, layout: Layout, cluster: Cluster, size: StageSize) -> float:
    learning = size.learning
    parallel = config.parallel
    ranks = layout.data_parallel_size * parallel.context_parallel_size if parallel.use_distributed_optimizer else 1
    shard = learning / ranks
    return cluster.memory_seconds(_GRADIENT_BYTES * learning + _OPTIMIZER_BYTES * shard)
