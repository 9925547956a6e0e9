"""How a model computes: precision and recomputation, as arguments of megatron-core's TransformerConfig."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_vlm.config import TrainingConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Computation:
    """Precision and recomputation, as in `TrainingConfig`."""

    precision: Literal["fp32", "bf16"] = "fp32"
    fp8: Literal["hybrid", "e4m3"] | None = None
    recompute: Literal["none", "full", "selective"] = "none"

    @classmethod
    def from_config(cls, training: TrainingConfig) -> "Computation":
        """Take the fields from the settings of a training stage."""
        return cls(precision=training.precision, fp8=training.fp8, recompute=training.recompute)

    def common_arguments(self) -> dict[str, Any]:
        """Return the arguments that are the same for every part."""
        dtype = _DTYPES[self.precision]
        return {
            # Weights are drawn whole on the CPU, then sliced: their values do not depend on the tensor-parallel size.
            "use_cpu_initialization": True,
            "params_dtype": dtype,
            "pipeline_dtype": dtype,
            "bf16": dtype is torch.bfloat16,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            # Micro-batches return a sum and a count; finalize_model_grads divides once by the global count.
            "calculate_per_token_loss": True,
            "gradient_accumulation_fusion": False,
            # These need torch.compile or CUDA extensions: no gain on the CPU, and redundant with transformer-engine.
            "masked_softmax_fusion": False,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "persist_layer_norm": False,
            "cross_entropy_loss_fusion": False,
        }

    def recompute_arguments(self, *, selective: bool = True) -> dict[str, Any]:
        """Return the arguments for recomputation; with `selective=False`, selective recomputation is ignored."""
        if self.recompute == "full":
            return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        if self.recompute == "selective" and selective:
            return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
        return {}
