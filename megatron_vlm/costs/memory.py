"""Memory per rank, estimated from the settings."""

from dataclasses import dataclass
from itertools import accumulate

from megatron_vlm.config import LanguageConfig, TrainConfig
from megatron_vlm.costs.activations import Backend, stage_activations
from megatron_vlm.costs.flops import Work
from megatron_vlm.costs.parameters import StageSize, stage_sizes
from megatron_vlm.costs.rows import pairs, text

LIBRARIES = 4 * 2**30
"""Of NCCL, the CUDA context, the workspaces of kernels and gaps between tensors: 2 to 4 GiB by experience on A100 with
32 GPUs and more, not measured with this code. [bytes]"""

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
    """Of all micro-batches in flight, and what the backward pass of a layer or the loss needs for a moment."""
    start: int
    """Held at once when the gradient buffers are made: weights, their copy in the buffers, and gradients."""

    @property
    def peak(self) -> int:
        """The most that tensors take, in a step or at the start."""
        return max(self.weights + self.gradients + self.optimizer + self.activations, self.start)

    @property
    def total(self) -> int:
        """The peak and `LIBRARIES`."""
        return self.peak + LIBRARIES


def estimate_memory(
    config: TrainConfig,
    stage: int,
    data_parallel_size: int,
    *,
    backend: Backend = "torch",
    work: Work | None = None,
) -> MemoryEstimate:
    """Return the memory of a rank of one pipeline stage on a GPU.

    Args:
        config: settings of the run.
        stage: pipeline stage, from 0.
        data_parallel_size: ranks with rows of their own; with their context-parallel peers they share the optimizer's
            state.
        backend: layers of the decoder.
        work: images and labels of the fullest micro-batch; None: rows full of image-text pairs, or of text with a loss
            at every position, whichever takes more.

    Raises:
        ConfigError: the number of patches depends on the image size.
    """
    size, training, parallel = stage_sizes(config)[stage], config.training, config.parallel
    learning, number = size.learning, _WEIGHT_BYTES[training.precision]
    sharded_over = data_parallel_size * parallel.context_parallel_size if parallel.use_distributed_optimizer else 1
    num_micro_batches = training.global_batch_size // (training.micro_batch_size * data_parallel_size)
    rows = [pairs(config), text(config)] if work is None else [work]
    activations = [stage_activations(config, stage, row, backend, num_micro_batches) for row in rows]
    weights, gradients = size.parameters * number, learning * _GRADIENT_BYTES
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=learning * _OPTIMIZER_BYTES[training.precision] // sharded_over,
        activations=int(number * max(held.kept + held.working for held in activations)),
        start=weights + _held_at_start(size, number if parallel.use_distributed_optimizer else 0),
    )


def _held_at_start(size: StageSize, copied_bytes: int) -> int:
    """Return the most that the gradients and the copies of weights take while the buffers are made [bytes].

    The buffers of the distributed optimizer take the place of the weights, one model chunk after the other.
    """
    gradients = accumulate(_GRADIENT_BYTES * learning for learning in size.learning_by_chunk)
    return max(held + copied_bytes * learning for held, learning in zip(gradients, size.learning_by_chunk, strict=True))


def cache_bytes(language: LanguageConfig, itemsize: int) -> int:
    """Return the size of the key/value cache per position [bytes]; `itemsize` is the size of one number [bytes]."""
    _, key_value = language.attention_sizes
    return 2 * itemsize * language.num_layers * key_value
