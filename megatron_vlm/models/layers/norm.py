"""Norms of torch for megatron-core's specs, right under sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

_KINDS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


class Norm:
    """Factory of an RMSNorm or LayerNorm, as `config.normalization` says.

    Under sequence parallelism each tensor-parallel rank normalises other tokens, so the gradients of its weights have
    to be summed over these ranks: megatron-core's `finalize_model_grads` does that for parameters marked
    `sequence_parallel`. Its own torch norm is never marked and therefore refuses sequence parallelism.
    """

    def __new__(  # type: ignore[misc]  # specs take a class, and call it for a module
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> torch.nn.Module:
        """Build the norm.

        Raises:
            ValueError: the config asks for a norm that only transformer-engine has.
        """
        if config.layernorm_zero_centered_gamma or config.memory_efficient_layer_norm:
            raise ValueError("zero-centred gamma and the memory-efficient norm need the transformer_engine backend")
        norm = _KINDS[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
