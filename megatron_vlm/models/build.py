"""Build the model chunks of this rank, freeze parameters and add the adapter."""

import re
from collections.abc import Iterable
from types import ModuleType

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_vlm.config import AdapterConfig, ModelConfig, ParallelConfig
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.learning import learning_of
from megatron_vlm.config.modules import find_module
from megatron_vlm.config.patterns import matches_any, parameter_sizes
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.language_model import LanguageModel, language_transformer_config
from megatron_vlm.models.layers.gradients import RecomputedBlock
from megatron_vlm.models.layers.replicas import Replicated, mark_replicated, replica_groups
from megatron_vlm.models.layers.specs import choose_backend
from megatron_vlm.models.parameter_names import global_parameters
from megatron_vlm.models.vlm import VisionLanguageModel


def build_model(
    model: ModelConfig, parallel: ParallelConfig, computation: Computation, freeze: Iterable[str] = ()
) -> list[VisionLanguageModel]:
    """Build this rank's chunks: one, or one per virtual pipeline stage.

    Needs megatron-core's parallel state, set up with the same `parallel`. The weights are random, but the same for
    every tensor-parallel size.

    Args:
        model: types and sizes of the parts.
        parallel: how they are distributed over the ranks.
        computation: precision and recomputation.
        freeze: patterns of parameters that do not learn, as in `training.freeze`; the weights of an adapter always do.

    Raises:
        ConfigError: no module builds the type of a part, or the backend is not available.
    """
    frozen = tuple(freeze)
    learning = learning_of(model, frozen)
    placed = parallel.chunk_layers(model.language.num_layers)[parallel_state.get_pipeline_model_parallel_rank()]
    chunks = []
    for number, layers in enumerate(placed):
        vp_stage = number if parallel.num_model_chunks else None
        chunk = _build_chunk(model, parallel, computation, vp_stage)
        _freeze(chunk, frozen)
        _adapt(chunk, model, frozen)
        RecomputedBlock.replace_in(chunk)
        chunk.language_model.input_learns = learning.before_layer(layers.start)
        if torch.cuda.is_available():
            chunk.cuda(torch.cuda.current_device())
        chunks.append(chunk)
    return chunks


def _build_chunk(
    model: ModelConfig, parallel: ParallelConfig, computation: Computation, vp_stage: int | None
) -> VisionLanguageModel:
    backend = choose_backend(model.backend)
    patches = model.fixed_patches("the exchange of image features between ranks")
    language_config = language_transformer_config(model.language, parallel, computation, backend)
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    language_model = LanguageModel(
        language_config, model.language, backend, pre_process=first, post_process=last, vp_stage=vp_stage
    )
    return VisionLanguageModel(
        language_config,
        vision=_build_vision(model, parallel, computation, patches) if first else None,
        language_model=language_model,
        image_size=model.vision.image_size,
    )


def _build_vision(
    model: ModelConfig, parallel: ParallelConfig, computation: Computation, patches: Grid
) -> tuple[Replicated, Replicated]:
    groups, vision, projection = replica_groups(), model.vision, model.projection
    tower_module = find_module("megatron_vlm.models.towers", vision.type, "model.vision.type")
    projector_module = find_module("megatron_vlm.models.projectors", projection.type, "model.projection.type")
    tower = tower_module.build(vision, computation, groups.split() if parallel.vision_tensor_parallel else groups)
    projector = projector_module.build(
        projection,
        computation,
        groups,
        patches=patches,
        input_size=vision.feature_size,
        output_size=model.language.hidden_size,
        init_method_std=vision.init_method_std,
    )
    return tower, projector


def _freeze(chunk: VisionLanguageModel, patterns: tuple[str, ...]) -> None:
    for name, parameter in global_parameters(chunk):
        if matches_any(patterns, name):
            parameter.requires_grad_(False)


def _adapt(chunk: VisionLanguageModel, model: ModelConfig, frozen: tuple[str, ...]) -> None:
    """Add the weights of the adapter and mark what its checkpoints hold, then mark all weights of the vision parts."""
    if model.adapter is not None:
        there = set(chunk.parameters())
        _find_adapter(model.adapter).apply(model.adapter, chunk)
        learning = {_in_any_layer(name) for name in parameter_sizes(model) if not matches_any(frozen, name)}
        for name, parameter in global_parameters(chunk):
            is_new = parameter not in there
            parameter.of_adapter = is_new  # type: ignore[attr-defined]
            parameter.stays_in_base = not is_new and _in_any_layer(name) not in learning  # type: ignore[attr-defined]
    if chunk.pre_process:
        mark_replicated(chunk.vision_model, is_split=chunk.vision_model.groups.tensor.size() > 1)
        mark_replicated(chunk.vision_projection)


def _in_any_layer(name: str) -> str:
    """Return the name without the number of its layer: a checkpoint stores all layers as one tensor."""
    return re.sub(r"\.layers\.\d+\.", ".layers.", name)


def _find_adapter(adapter: AdapterConfig) -> ModuleType:
    return find_module("megatron_vlm.models.adapters", adapter.type, "model.adapter.type")


def is_of_adapter(parameter: Tensor) -> bool:
    """Return whether the adapter added this parameter."""
    return getattr(parameter, "of_adapter", False)


def stays_in_base(parameter: Tensor) -> bool:
    """Return whether checkpoints of a run with an adapter leave it out: it learns in no layer."""
    return getattr(parameter, "stays_in_base", False)


def start_adapter(adapter: AdapterConfig, chunks: Iterable[VisionLanguageModel]) -> None:
    """Give the adapter's weights the values that depend on the base, which has just been loaded."""
    for chunk in chunks:
        _find_adapter(adapter).start(adapter, chunk)
