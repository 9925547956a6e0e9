"""Parameters per rank, computed from the settings."""

from dataclasses import dataclass

from megatron_vlm.config import PART_NAMES, ModelConfig, ParallelConfig, TrainConfig
from megatron_vlm.config.language import LAYER_NAMES
from megatron_vlm.config.learning import learning_of
from megatron_vlm.config.patterns import parameter_sizes

_LANGUAGE = PART_NAMES[-1]
_EMBEDDING, _OUTPUT = f"{_LANGUAGE}.embedding.word_embeddings.weight", f"{_LANGUAGE}.output_layer.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSize:
    """The parameters on one rank of a pipeline stage."""

    num_layers: int
    """Decoder layers."""
    learning: int = 0
    """Parameters of all parts that learn, with those of the adapter."""
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


def stage_sizes(config: TrainConfig) -> tuple[StageSize, ...]:
    """Return the parameters on a rank of each pipeline stage, first stage first."""
    model, parallel = config.model, config.parallel
    frozen = learning_of(model, config.training.freeze).frozen
    found = []
    for stage, layers in enumerate(stage_layers(model, parallel)):
        sizes = _on_a_rank(model, parallel, stage, layers)
        parts = {part: sum(size for name, size, _ in sizes if name.startswith(f"{part}.")) for part in PART_NAMES}
        adapter = _adapter(model, parallel, stage, len(layers))
        learning = adapter + sum(size for _, size, source in sizes if source not in frozen)
        found.append(StageSize(num_layers=len(layers), learning=learning, adapter=adapter, **parts))
    return tuple(found)


def stage_layers(model: ModelConfig, parallel: ParallelConfig) -> tuple[tuple[int, ...], ...]:
    """Return the decoder layers on each pipeline stage, counted from 0; model chunks go round the stages."""
    pp, layers = parallel.pipeline_model_parallel_size, model.language.num_layers
    first = parallel.num_layers_in_first_pipeline_stage
    if first is not None:
        rest = (layers - first) // (pp - 1)
        borders = [0, *(first + stage * rest for stage in range(pp))]
        return tuple(tuple(range(*borders[stage : stage + 2])) for stage in range(pp))
    size = layers // pp // (parallel.virtual_pipeline_model_parallel_size or 1)
    return tuple(tuple(layer for layer in range(layers) if layer // size % pp == stage) for stage in range(pp))


def _on_a_rank(
    model: ModelConfig, parallel: ParallelConfig, stage: int, layers: tuple[int, ...]
) -> list[tuple[str, int, str]]:
    """Return name and size of the parameters on a rank, and the name of the one whose freezing decides on it."""
    sizes, tp = parameter_sizes(model), parallel.tensor_model_parallel_size
    is_first, is_last = stage == 0, stage == parallel.pipeline_model_parallel_size - 1
    found = []
    if is_first:
        found += [(name, size, name) for name, size in sizes.items() if not name.startswith(f"{_LANGUAGE}.")]
        found.append((_EMBEDDING, sizes[_EMBEDDING] // tp, _EMBEDDING))
    for layer in layers:
        for inner in LAYER_NAMES:
            name = f"{_LANGUAGE}.decoder.layers.{layer}.{inner}"
            found.append((name, sizes[name] // (tp if ".linear_" in inner else 1), name))
    if is_last:
        norm = f"{_LANGUAGE}.decoder.final_layernorm.weight"
        found.append((norm, sizes[norm], norm))
        # A tied output layer shares the embedding if it is on the same rank; on another stage it is a copy.
        source = _OUTPUT if _OUTPUT in sizes else _EMBEDDING
        if source == _OUTPUT or not is_first:
            found.append((_OUTPUT, sizes[source] // tp, source))
    return found


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
