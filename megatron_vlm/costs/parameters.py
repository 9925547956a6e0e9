"""Parameters per rank, computed from the settings."""

from dataclasses import dataclass

from megatron_vlm.config import ModelConfig, ParallelConfig, TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSize:
    """The parameters on one rank of a pipeline stage."""

    num_layers: int
    """Decoder layers."""
    vision_model: int = 0
    """Parameters of this part on this rank; the same for the next two."""
    vision_projection: int = 0
    language_model: int = 0
    adapter: int = 0
    """Parameters that the adapter adds on this rank; they always learn."""

    @property
    def parameters(self) -> int:
        """Parameters of all parts and the adapter."""
        return self.vision_model + self.vision_projection + self.language_model + self.adapter

    def learning(self, freeze: tuple[str, ...]) -> int:
        """Return the number of parameters that learn."""
        parts = ("vision_model", "vision_projection", "language_model")
        return self.adapter + sum(getattr(self, part) for part in parts if part not in freeze)


def stage_sizes(config: TrainConfig) -> tuple[StageSize, ...]:
    """Return the parameters on a rank of each pipeline stage, first stage first."""
    model, parallel = config.model, config.parallel
    return tuple(
        StageSize(
            num_layers=num_layers,
            vision_model=model.vision.num_parameters if stage == 0 else 0,
            vision_projection=_projection(model) if stage == 0 else 0,
            language_model=_language(model, parallel, stage, num_layers),
            adapter=_adapter(model, parallel, stage, num_layers),
        )
        for stage, num_layers in enumerate(_layers_per_stage(model, parallel))
    )


def _layers_per_stage(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    pp, layers = parallel.pipeline_model_parallel_size, model.language.num_layers
    first = parallel.num_layers_in_first_pipeline_stage
    if first is None:
        return [layers // pp] * pp
    return [first, *[(layers - first) // (pp - 1)] * (pp - 1)]


def _projection(model: ModelConfig) -> int:
    return model.projection.num_parameters(model.vision.feature_size, model.language.hidden_size)


def _language(model: ModelConfig, parallel: ParallelConfig, stage: int, num_layers: int) -> int:
    language, tp = model.language, parallel.tensor_model_parallel_size
    is_first, is_last = stage == 0, stage == parallel.pipeline_model_parallel_size - 1
    embedding = language.embedding_weights // tp
    size = num_layers * (language.layer_weights // tp + language.layer_norms)
    size += embedding if is_first else 0
    if is_last:
        size += language.hidden_size  # the final norm
        # A tied output layer shares the embedding if it is on the same rank; on another stage it is a copy.
        size += 0 if is_first and language.share_embeddings_and_output_weights else embedding
    return size


def _adapter(model: ModelConfig, parallel: ParallelConfig, stage: int, num_layers: int) -> int:
    adapter = model.adapter
    if adapter is None:
        return 0
    parts = adapter.parts if stage == 0 else [part for part in adapter.parts if part == "language_model"]
    return sum(
        adapter.num_parameters(
            model, part, num_layers=num_layers, tensor_parallel_size=parallel.tensor_model_parallel_size
        )
        for part in parts
    )
