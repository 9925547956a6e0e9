"""Memory per rank, estimated from the settings."""

from dataclasses import dataclass

from megatron_vlm.config import LanguageConfig, TrainConfig
from megatron_vlm.costs.parameters import stage_sizes

_WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
_GRADIENT_BYTES = 4  # gradients are accumulated in FP32
# The two moments of AdamW in FP32; for BF16 weights also an FP32 copy of the weights.
_OPTIMIZER_BYTES = {"fp32": 8, "bf16": 12}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Memory of one rank [bytes]; the activations are an estimate, the rest follows from the parameters."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all kinds, not counting memory held by the allocator and libraries."""
        return self.weights + self.gradients + self.optimizer + self.activations


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


def _activations(config: TrainConfig, stage: int, num_layers: int) -> int:
    """Estimate the activations kept for the backward pass of the decoder, over all micro-batches in flight.

    Source: Korthikanti et al., arXiv:2205.05198, section 4, with flash attention and a gated MLP.
    """
    language, parallel = config.model.language, config.parallel
    hidden, (query, key_value) = language.hidden_size, language.attention_sizes
    split = 2 * query + 2 * key_value + 3 * language.ffn_hidden_size  # always split over the tensor-parallel ranks
    whole = 4 * hidden  # inputs of norms and parallel regions; split only with sequence parallelism
    tp = parallel.tensor_model_parallel_size
    per_token = split // tp + whole // (tp if parallel.sequence_parallel else 1)
    if config.training.recompute == "full":
        per_token = hidden // (tp if parallel.sequence_parallel else 1)
    tokens = config.training.micro_batch_size * config.data.seq_length
    in_flight = parallel.pipeline_model_parallel_size - stage
    return num_layers * per_token * tokens * in_flight * _WEIGHT_BYTES[config.training.precision]


def cache_bytes(language: LanguageConfig, itemsize: int) -> int:
    """Return the size of the key/value cache per position [bytes]; `itemsize` is the size of one number [bytes]."""
    _, key_value = language.attention_sizes
    return 2 * itemsize * language.num_layers * key_value
