"""torch's norms for megatron-core's specs, correct under sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

_KINDS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


class Norm:
    """Factory for an RMSNorm or LayerNorm, chosen by `config.normalization`.

    With sequence parallelism, each tensor-parallel rank normalises different tokens, so the gradients of the weights
    must be summed over these ranks. megatron-core's `finalize_model_grads` does this for parameters marked
    `sequence_parallel`; its own torch norm does not mark them, and therefore rejects sequence parallelism.
    """

    def __new__(  # type: ignore[misc]  # specs take a class and call it to build a module
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> torch.nn.Module:
        """Build the norm.

        Raises:
            ValueError: the config requires a norm that only transformer-engine implements.
        """
        if config.layernorm_zero_centered_gamma or config.memory_efficient_layer_norm:
            raise ValueError("zero-centred gamma and the memory-efficient norm need the transformer_engine backend")
        norm = _KINDS[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
