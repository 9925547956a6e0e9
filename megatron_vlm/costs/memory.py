"""How many parameters and how much memory each rank holds, from the settings alone."""

from dataclasses import dataclass

from megatron_vlm.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_vlm.config.train import TrainConfig

_WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
_GRADIENT_BYTES = 4  # gradients are summed in FP32
# Two moments of AdamW in FP32, and for BF16 weights their FP32 copy.
_OPTIMIZER_BYTES = {"fp32": 8, "bf16": 12}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSize:
    """What one rank of a pipeline stage holds."""

    num_layers: int
    """Decoder layers."""
    vision_model: int = 0
    """Parameters of the part on this rank; likewise the next two."""
    vision_projection: int = 0
    language_model: int = 0

    @property
    def parameters(self) -> int:
        """Parameters of all parts."""
        return self.vision_model + self.vision_projection + self.language_model

    def learning(self, freeze: tuple[str, ...]) -> int:
        """Return the parameters that learn."""
        parts = ("vision_model", "vision_projection", "language_model")
        return sum(getattr(self, part) for part in parts if part not in freeze)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Memory of one rank [bytes]; activations are an estimate, the rest follows from the parameters."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all kinds, without what the allocator and the libraries keep."""
        return self.weights + self.gradients + self.optimizer + self.activations


def stage_sizes(config: TrainConfig) -> tuple[StageSize, ...]:
    """Return what a rank of each pipeline stage holds, first stage first."""
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    embedding = model.language.padded_vocab_size * model.language.hidden_size // tp
    sizes = []
    for stage, num_layers in enumerate(_layers_per_stage(config)):
        is_first, is_last = stage == 0, stage == pp - 1
        language = num_layers * _decoder_layer(model.language, tp)
        language += embedding if is_first else 0
        if is_last:
            language += model.language.hidden_size
            # A tied head shares the embedding of its own rank; on another stage it is a copy.
            language += 0 if is_first and model.language.share_embeddings_and_output_weights else embedding
        sizes.append(
            StageSize(
                num_layers=num_layers,
                vision_model=_tower(model.vision) if is_first else 0,
                vision_projection=_projection(model) if is_first else 0,
                language_model=language,
            )
        )
    return tuple(sizes)


def estimate_memory(config: TrainConfig, stage: int, data_parallel_size: int) -> MemoryEstimate:
    """Return the memory of a rank of one pipeline stage."""
    size, training = stage_sizes(config)[stage], config.training
    learning = size.learning(training.freeze)
    sharded_over = data_parallel_size if config.parallel.use_distributed_optimizer else 1
    return MemoryEstimate(
        weights=size.parameters * _WEIGHT_BYTES[training.precision],
        gradients=learning * _GRADIENT_BYTES,
        optimizer=learning * _OPTIMIZER_BYTES[training.precision] // sharded_over,
        activations=_activations(config, stage, size.num_layers),
    )


def _layers_per_stage(config: TrainConfig) -> list[int]:
    pp, layers = config.parallel.pipeline_model_parallel_size, config.model.language.num_layers
    first = config.parallel.num_layers_in_first_pipeline_stage
    if first is None:
        return [layers // pp] * pp
    return [first, *[(layers - first) // (pp - 1)] * (pp - 1)]


def _decoder_layer(language: LanguageConfig, tp: int) -> int:
    hidden, channels = language.hidden_size, language.head_channels
    query, key_value = language.num_attention_heads * channels, language.query_groups * channels
    attention = hidden * (2 * query + 2 * key_value)
    return (attention + 3 * hidden * language.ffn_hidden_size) // tp + 2 * hidden


def _tower(vision: VisionConfig) -> int:
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size
    layer = 4 * hidden * hidden + 2 * hidden * ffn + 9 * hidden + ffn
    class_tokens = int(vision.class_token)
    patches = 3 * vision.patch_size**2 * hidden + (0 if vision.class_token else hidden)
    positions = (vision.num_patches + class_tokens) * hidden
    norm = 2 * hidden if vision.pre_norm else 0
    return vision.num_layers_run * layer + patches + positions + class_tokens * hidden + norm


def _projection(model: ModelConfig) -> int:
    inside, outside = model.vision.hidden_size, model.language.hidden_size
    second = outside * (outside + 1) if model.projection.type == "mlp2x_gelu" else 0
    return (inside + 1) * outside + second


def _activations(config: TrainConfig, stage: int, num_layers: int) -> int:
    """Estimate what the backward pass of the decoder keeps, for the micro-batches that are under way at once.

    Source: Korthikanti et al., arXiv:2205.05198, section 4, with flash attention and a gated MLP.
    """
    language, parallel = config.model.language, config.parallel
    hidden, channels = language.hidden_size, language.head_channels
    query, key_value = language.num_attention_heads * channels, language.query_groups * channels
    split = 2 * query + 2 * key_value + 3 * language.ffn_hidden_size  # always over the tensor-parallel ranks
    whole = 4 * hidden  # inputs of norms and of the regions; over them with sequence parallelism only
    tp = parallel.tensor_model_parallel_size
    per_token = split // tp + whole // (tp if parallel.sequence_parallel else 1)
    if config.training.recompute == "full":
        per_token = hidden // (tp if parallel.sequence_parallel else 1)
    tokens = config.training.micro_batch_size * config.data.seq_length
    under_way = parallel.pipeline_model_parallel_size - stage
    return num_layers * per_token * tokens * under_way * _WEIGHT_BYTES[config.training.precision]
