"""Parameters per rank, computed from the settings."""

from dataclasses import dataclass
from itertools import chain

from megatron_vlm.config import PART_NAMES, ModelConfig, ParallelConfig, TrainConfig
from megatron_vlm.config.language import LAYER_NAMES
from megatron_vlm.config.learning import learning_of
from megatron_vlm.config.patterns import matches_any, parameter_sizes

_TOWER, _, _LANGUAGE = PART_NAMES
_EMBEDDING, _OUTPUT = f"{_LANGUAGE}.embedding.word_embeddings.weight", f"{_LANGUAGE}.output_layer.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSize:
    """The parameters on one rank of a pipeline stage."""

    num_layers: int
    """Decoder layers."""
    learning: int = 0
    """Parameters of all parts that learn, with those of the adapter."""
    learning_by_chunk: tuple[int, ...] = (0,)
    """Those of each model chunk."""
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
    placed = config.parallel.chunk_layers(config.model.language.num_layers)
    return tuple(_stage_size(config, stage, chunks) for stage, chunks in enumerate(placed))


def _stage_size(config: TrainConfig, stage: int, chunks: tuple[range, ...]) -> StageSize:
    model, pp = config.model, config.parallel.pipeline_model_parallel_size
    frozen = learning_of(model, config.training.freeze).frozen
    parts, adapter, learning = dict.fromkeys(PART_NAMES, 0), 0, []
    for number, layers in enumerate(chunks):
        is_first, is_last = stage == number == 0, stage == pp - 1 and number == len(chunks) - 1
        sizes = _of_chunk(model, config.parallel, layers, is_first=is_first, is_last=is_last)
        for part in PART_NAMES:
            parts[part] += sum(size for name, size, _ in sizes if name.startswith(f"{part}."))
        added = _adapter(model, config.parallel, len(layers), is_first=is_first)
        adapter += added
        learning.append(added + sum(size for _, size, source in sizes if source not in frozen))
    return StageSize(
        num_layers=sum(map(len, chunks)),
        learning=sum(learning),
        learning_by_chunk=tuple(learning),
        adapter=adapter,
        **parts,
    )


def stage_layers(model: ModelConfig, parallel: ParallelConfig) -> tuple[tuple[int, ...], ...]:
    """Return the decoder layers on each pipeline stage, counted from 0, of all its model chunks."""
    return tuple(tuple(chain(*chunks)) for chunks in parallel.chunk_layers(model.language.num_layers))


def _of_chunk(
    model: ModelConfig, parallel: ParallelConfig, layers: range, *, is_first: bool, is_last: bool
) -> list[tuple[str, int, str]]:
    """Return name and size of a chunk's parameters on a rank, and the name of the one whose freezing decides on it."""
    sizes, tp = parameter_sizes(model), parallel.tensor_model_parallel_size
    found = []
    if is_first:
        split = [f"{_TOWER}.{name}" for name in model.vision.split_parameters if parallel.vision_tensor_parallel]
        for name, size in sizes.items():
            if not name.startswith(f"{_LANGUAGE}."):
                found.append((name, size // (tp if matches_any(split, name) else 1), name))
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


def _adapter(model: ModelConfig, parallel: ParallelConfig, num_layers: int, *, is_first: bool) -> int:
    adapter = model.adapter
    if adapter is None:
        return 0
    parts = adapter.parts if is_first else [part for part in adapter.parts if part == "language_model"]
    return sum(
        adapter.num_parameters(
            model, part, num_layers=num_layers, tensor_parallel_size=parallel.tensor_model_parallel_size
        )
        for part in parts
    )
