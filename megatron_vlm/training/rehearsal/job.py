"""What is played: the job, and which of its ranks and micro-batches. Needs no torch."""

from dataclasses import dataclass, replace

from megatron_vlm.config import Layout, ParallelConfig, TrainConfig
from megatron_vlm.training.rehearsal.facts import RankFacts

FEW_IMAGES = (0, 1, 3)
"""Images of the made-up rows that follow those with as many as fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """A job to play."""

    config: TrainConfig
    """As `playable` returns it."""
    layout: Layout
    iterations: int
    num_micro_batches: int
    """Micro-batches that are played of each step."""
    has_data: bool
    """Whether rows come from the shards, by the plan in the run folder; otherwise they are made up."""


def playable(config: TrainConfig, run_dir: str) -> TrainConfig:
    """Return settings without what a rehearsal does not play: other backends than torch, checkpoints, hooks."""
    return replace(
        config,
        run_dir=run_dir,
        model=replace(config.model, backend="torch"),
        data=replace(config.data, num_workers=0),
        training=replace(config.training, fp8=None, hooks=()),
        checkpoint=replace(config.checkpoint, load_weights=None),
    )


def micro_batches_to_play(config: TrainConfig, layout: Layout) -> int:
    """Return how many micro-batches show all of a step: they fill the pipeline, reach its steady part, and mix rows."""
    enough, stages = most_in_flight(config.parallel) + len(FEW_IMAGES), config.parallel.pipeline_model_parallel_size
    if config.parallel.num_model_chunks:
        enough = -(-enough // stages) * stages  # megatron-core's interleaved schedule takes multiples only
    return min(enough, layout.num_micro_batches)


def most_in_flight(parallel: ParallelConfig) -> int:
    """Return how many micro-batches a stage may hold activations of, at most."""
    return parallel.pipeline_model_parallel_size * (2 if parallel.num_model_chunks else 1)


def ranks_to_play(config: TrainConfig, layout: Layout) -> tuple[int, ...]:
    """Return each pipeline stage's first rank, and one more of its tensor-, context- and data-parallel group."""
    parallel = config.parallel
    tp, cp, dp = parallel.tensor_model_parallel_size, parallel.context_parallel_size, layout.data_parallel_size
    stages = range(config.parallel.pipeline_model_parallel_size)
    # Ranks count along the tensor-parallel group first, then context parallel, then data parallel, then the stages.
    places = {0, tp - 1, tp if cp > 1 else 0, tp * cp if dp > 1 else 0}
    return tuple(sorted(stage * tp * cp * dp + place for stage in stages for place in places))


def play_rank(rehearsal: Rehearsal, rank: int) -> RankFacts:
    """Play one rank in this process, which must not have imported torch, or be one that played before.

    Raises:
        ConfigError: torch needs a compiled part for it, and there is no compiler.
    """
    from megatron_vlm.platform.fake_device.guard import load_guard

    load_guard()
    from megatron_vlm.platform.fake_device.device import install

    install()
    from megatron_vlm.training.rehearsal.play import play

    return play(rehearsal, rank)
