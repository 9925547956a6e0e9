"""Layouts of a job, ranked by predicted step time."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import ConfigError, Layout, ParallelConfig, TrainConfig, derive_layout
from megatron_vlm.costs.activations import Backend
from megatron_vlm.costs.cluster import Cluster
from megatron_vlm.costs.flops import Work
from megatron_vlm.costs.memory import estimate_memory
from megatron_vlm.costs.rows import pairs
from megatron_vlm.costs.step_time import StepTime, predict_step

_MICRO_BATCH_SIZES = (1, 2, 4)
# Flash attention keeps no scores, so selective recomputation would save nothing.
_RECOMPUTE = ("none", "full")
TIE = 0.03
"""Two predictions that differ by less are equal."""
_LAYOUT = "parallel.pipeline_model_parallel_layout"
_MAX_SHIFT = 3
"""Layers that each later stage may take over from the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedLayout:
    """A layout that fits, with its prediction."""

    settings: dict[str, Any]
    """The settings that make it, by dotted name."""
    layout: Layout
    memory: int
    """Of the fullest stage, with that of libraries [bytes]."""
    step: StepTime

    @property
    def complexity(self) -> tuple[int, ...]:
        """Orders layouts by how much of a machinery they need: pipeline, chunks, context and tensor parallelism, ..."""
        names = (
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "tensor_model_parallel_size",
        )
        sizes = [self.settings[f"parallel.{name}"] or 1 for name in names]
        return (*sizes, self.settings["training.recompute"] != "none", self.settings["training.micro_batch_size"])

    @property
    def limit(self) -> str:
        """What takes most of the time beside the matrix products, which always take most."""
        rest = {name: seconds for name, seconds in self.step.spent.items() if name != "products"}
        return max(rest, key=rest.__getitem__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A layout that cannot run."""

    settings: dict[str, Any]
    reason: str
    fix: str | None = None
    memory: int | None = None
    """If this is the reason: that of the fullest stage [bytes]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """All layouts of a job."""

    fits: tuple[RankedLayout, ...]
    """Fastest first; of those that differ only in recomputation and in the split of the layers, the fastest."""
    left_out: tuple[LeftOut, ...]
    """Likewise the one that comes closest to fitting."""
    given: RankedLayout | LeftOut
    """The layout of the settings themselves."""

    @property
    def suggested(self) -> RankedLayout | None:
        """The simplest of those that are as fast as the first, as far as such a prediction can tell."""
        as_fast = [one for one in self.fits if one.step.seconds <= self.fits[0].step.seconds * (1 + TIE)]
        return min(as_fast, key=lambda one: one.complexity, default=None)


def rank_layouts(
    config: TrainConfig, world_size: int, cluster: Cluster, *, backend: Backend, row: Work | None = None
) -> Ranking:
    """Try tensor, context, pipeline and virtual pipeline sizes, micro-batches, recomputation and splits of the layers.

    Args:
        config: settings of the run; everything but its layout stays.
        world_size: ranks of the job.
        cluster: where it runs.
        backend: layers of the decoder.
        row: mean contents of a row; None: rows full of image-text pairs.

    Raises:
        ConfigError: the number of patches depends on the image size.
    """
    tried = [
        _try(config, settings, world_size, cluster, backend=backend, row=row)
        for settings in _settings(config, world_size, cluster.gpus_per_node)
    ]
    best: dict[tuple, RankedLayout] = {}
    left_out: dict[tuple, LeftOut] = {}
    for one in tried:
        key = _key(one.settings)
        if isinstance(one, RankedLayout):
            best[key] = min(best.get(key, one), one, key=lambda ranked: ranked.step.seconds)
        else:
            left_out[key] = min(left_out.get(key, one), one, key=lambda out: out.memory or 0)
    return Ranking(
        fits=tuple(sorted(best.values(), key=lambda ranked: ranked.step.seconds)),
        left_out=tuple(one for key, one in left_out.items() if key not in best),
        given=_try(config, _settings_of(config), world_size, cluster, backend=backend, row=row),
    )


def _try(
    config: TrainConfig,
    settings: dict[str, Any],
    world_size: int,
    cluster: Cluster,
    *,
    backend: Backend,
    row: Work | None,
) -> RankedLayout | LeftOut:
    try:
        candidate = _with(config, settings)
        layout = derive_layout(candidate, world_size)
    except ConfigError as error:
        return LeftOut(settings=settings, reason=error.what, fix=error.fix)
    memory = _fullest_stage(candidate, layout, backend)
    if memory > cluster.gpu.memory:
        reason = f"needs {memory / 1e9:.1f} GB of {cluster.gpu.memory / 1e9:.0f}"
        return LeftOut(settings=settings, reason=reason, memory=memory)
    work = pairs(candidate) if row is None else row.times(candidate.training.micro_batch_size)
    step = predict_step(candidate, layout, work, cluster)
    return RankedLayout(settings=settings, layout=layout, memory=memory, step=step)


def _settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return the layout of a run in the form of those that are tried."""
    names = next(_settings(config, 1, 1))
    return {name: getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in names}


def _settings(config: TrainConfig, world_size: int, gpus_per_node: int) -> Iterator[dict[str, Any]]:
    layers = config.model.language.num_layers
    # Both exchange hidden states or keys in every layer, which only the links inside a node can bear.
    for tp, cp in _inside_a_node(config, world_size, gpus_per_node):
        for pp in (pp for pp in _divisors(max(1, world_size // (tp * cp))) if pp <= layers):
            for split, size, recompute in itertools.product(_splits(layers, pp), _MICRO_BATCH_SIZES, _RECOMPUTE):
                yield {
                    "parallel.tensor_model_parallel_size": tp,
                    "parallel.sequence_parallel": tp > 1,
                    "parallel.context_parallel_size": cp,
                    "parallel.pipeline_model_parallel_size": pp,
                    **split,
                    "training.micro_batch_size": size,
                    "training.recompute": recompute,
                }


def _inside_a_node(config: TrainConfig, world_size: int, gpus_per_node: int) -> Iterator[tuple[int, int]]:
    """Yield tensor- and context-parallel sizes; a context-parallel size that the settings have is tried in any case."""
    for tp in _divisors(min(gpus_per_node, world_size)):
        sizes = {size for size in _divisors(world_size // tp) if tp * size <= gpus_per_node}
        yield from ((tp, cp) for cp in sorted(sizes | {config.parallel.context_parallel_size}))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _splits(layers: int, pp: int) -> Iterator[dict[str, Any]]:
    """Yield the ways to spread the layers over the stages: evenly, in several chunks, with fewer on the first."""
    even: dict[str, Any] = {
        "parallel.virtual_pipeline_model_parallel_size": None,
        "parallel.overlap_p2p_comm": False,
        "parallel.num_layers_in_first_pipeline_stage": None,
        _LAYOUT: None,
    }
    yield even
    if pp == 1:
        return
    for chunks in _divisors(layers // pp)[1:]:
        yield {
            **even,
            "parallel.virtual_pipeline_model_parallel_size": chunks,
            "parallel.overlap_p2p_comm": True,
        }
    for shift in range(1, _MAX_SHIFT + 1):
        first = layers // pp - shift * (pp - 1)
        if layers % pp == 0 and first > 0:
            yield {**even, "parallel.num_layers_in_first_pipeline_stage": first}


def _with(config: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    sections: dict[str, dict[str, Any]] = {"parallel": {}, "training": {}}
    for name, value in settings.items():
        section, field = name.split(".")
        sections[section][field] = value
    parallel: ParallelConfig = dataclasses.replace(config.parallel, **sections["parallel"])
    training = dataclasses.replace(config.training, **sections["training"])
    return dataclasses.replace(config, parallel=parallel, training=training)


def _key(settings: dict[str, Any]) -> tuple:
    free = ("training.recompute", "parallel.num_layers_in_first_pipeline_stage", _LAYOUT)
    return tuple(value for name, value in settings.items() if name not in free)


def _fullest_stage(config: TrainConfig, layout: Layout, backend: Backend) -> int:
    return max(
        estimate_memory(config, stage, layout.data_parallel_size, backend=backend).total
        for stage in range(config.parallel.pipeline_model_parallel_size)
    )
