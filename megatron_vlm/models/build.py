"""Build the model chunks of this rank and freeze what does not learn."""

from collections.abc import Iterable

import torch
from megatron.core import parallel_state

from megatron_vlm.config import TrainConfig
from megatron_vlm.models.language_model import LanguageModel
from megatron_vlm.models.layers.image_parallel import mark_replicated, own_group
from megatron_vlm.models.layers.specs import choose_backend
from megatron_vlm.models.transformer_configs import (
    language_transformer_config,
    projection_transformer_config,
    vision_transformer_config,
)
from megatron_vlm.models.vision_model import VisionModel
from megatron_vlm.models.vision_projection import VisionProjection
from megatron_vlm.models.vlm import VisionLanguageModel


def build_model(config: TrainConfig) -> list[VisionLanguageModel]:
    """Build this rank's chunks: one, or one per virtual pipeline stage.

    Needs megatron-core's parallel state. Weights are random, the same for every tensor-parallel size.
    """
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    return [_build_chunk(config, vp_stage) for vp_stage in (range(virtual) if virtual else (None,))]


def _build_chunk(config: TrainConfig, vp_stage: int | None) -> VisionLanguageModel:
    backend = choose_backend(config.model.backend)
    language_config = language_transformer_config(config, backend)
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    language_model = LanguageModel(
        language_config, config.model.language, backend, pre_process=first, post_process=last, vp_stage=vp_stage
    )
    model = VisionLanguageModel(
        language_config,
        vision=_build_vision(config) if first else None,
        language_model=language_model,
        num_image_tokens=config.model.fixed_image_tokens("the exchange of image features between ranks"),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )
    if torch.cuda.is_available():
        model.cuda(torch.cuda.current_device())
    return model


def _build_vision(config: TrainConfig) -> tuple[VisionModel, VisionProjection]:
    tp_group = own_group()
    replica_group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    vision_model = VisionModel(
        vision_transformer_config(config), config.model.vision, tp_group=tp_group, replica_group=replica_group
    )
    vision_projection = VisionProjection(
        projection_transformer_config(config),
        config.model.projection,
        config.model.vision.hidden_size,
        tp_group=tp_group,
        replica_group=replica_group,
    )
    for module in (vision_model, vision_projection):
        mark_replicated(module)
    return vision_model, vision_projection


def freeze_parts(model: Iterable[VisionLanguageModel], part_names: Iterable[str]) -> None:
    """Stop the named parts from learning; call it before gradients are set up."""
    names = tuple(part_names)
    for chunk in model:
        for name in names:
            part = getattr(chunk, name, None)  # the vision parts are on the first stage only
            if part is not None:
                part.requires_grad_(False)
