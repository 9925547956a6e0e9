"""How a model computes: precision, recomputation and determinism, as arguments of megatron-core's TransformerConfig."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_vlm.config import TrainingConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Computation:
    """Precision, recomputation and determinism, as in `TrainingConfig`."""

    precision: Literal["fp32", "bf16"] = "fp32"
    fp8: Literal["hybrid", "e4m3"] | None = None
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    num_layers_at_start_in_bf16: int = 0
    num_layers_at_end_in_bf16: int = 0
    recompute: Literal["none", "full", "selective"] = "none"
    deterministic: bool = False

    @classmethod
    def from_config(cls, training: TrainingConfig) -> "Computation":
        """Take the fields from the settings of a training stage."""
        return cls(**{name: getattr(training, name) for name in cls.__dataclass_fields__})

    def common_arguments(self) -> dict[str, Any]:
        """Return the arguments that are the same for every part."""
        dtype = _DTYPES[self.precision]
        return {
            # Weights are drawn whole on the CPU, then sliced: their values do not depend on the tensor-parallel size.
            "use_cpu_initialization": True,
            "params_dtype": dtype,
            "pipeline_dtype": dtype,
            "bf16": dtype is torch.bfloat16,
            "deterministic_mode": self.deterministic,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            # Micro-batches return a sum and a count; finalize_model_grads divides once by the global count.
            "calculate_per_token_loss": True,
            "gradient_accumulation_fusion": False,
            # These need torch.compile or CUDA extensions: no gain on the CPU, and transformer-engine has its own.
            "masked_softmax_fusion": False,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "persist_layer_norm": False,
            "cross_entropy_loss_fusion": False,
        }

    def fp8_arguments(self) -> dict[str, Any]:
        """Return the arguments for FP8, which only transformer-engine's layers of the decoder compute in."""
        start, end = self.num_layers_at_start_in_bf16, self.num_layers_at_end_in_bf16
        return {
            "fp8": self.fp8,
            "fp8_recipe": self.fp8_recipe,
            "first_last_layers_bf16": bool(start or end),
            "num_layers_at_start_in_bf16": start,
            "num_layers_at_end_in_bf16": end,
        }

    def recompute_arguments(self, *, selective: bool = True) -> dict[str, Any]:
        """Return the arguments for recomputation; with `selective=False`, selective recomputation is ignored."""
        if self.recompute == "full":
            return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        if self.recompute == "selective" and selective:
            return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
        return {}
