"""megatron-core's TransformerConfig of each part, from our settings."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlm.config import ParallelConfig, TrainConfig
from megatron_vlm.models.layers.specs import Backend

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def quick_gelu(x: Tensor) -> Tensor:
    """Return x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """Return the tanh approximation of GELU (SigLIP)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_tanh": gelu_tanh}


def language_transformer_config(config: TrainConfig, backend: Backend) -> TransformerConfig:
    """Return the decoder's config, with the parallel layout of the job."""
    language, parallel = config.model.language, config.parallel
    fused = backend == "transformer_engine"
    return TransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.query_groups,
        kv_channels=language.head_channels,
        layernorm_epsilon=language.layernorm_epsilon,
        init_method_std=language.init_method_std,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        fp8=config.training.fp8,
        apply_rope_fusion=fused,
        gradient_accumulation_fusion=False,
        **_parallel_arguments(parallel),
        **_recompute_arguments(config.training.recompute),
        **_common_arguments(config),
    )


def vision_transformer_config(config: TrainConfig) -> TransformerConfig:
    """Return the tower's config: one layout-free replica a rank."""
    vision = config.model.vision
    # Selective recomputation of the attention core saves little in a tower of a few hundred tokens an image.
    recompute = config.training.recompute if config.training.recompute == "full" else "none"
    return TransformerConfig(
        num_layers=vision.num_layers_run,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        layernorm_epsilon=vision.layernorm_epsilon,
        init_method_std=vision.init_method_std,
        normalization="LayerNorm",
        add_bias_linear=True,
        activation_func=ACTIVATIONS[vision.activation],
        gradient_accumulation_fusion=False,
        **_recompute_arguments(recompute),
        **_common_arguments(config),
    )


def projection_transformer_config(config: TrainConfig) -> TransformerConfig:
    """Return the projection's config; its output is as wide as the language model."""
    language, vision = config.model.language, config.model.vision
    return TransformerConfig(
        num_layers=1,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.hidden_size,
        num_attention_heads=language.num_attention_heads,
        init_method_std=vision.init_method_std,
        add_bias_linear=True,
        activation_func=F.gelu,
        gradient_accumulation_fusion=False,
        **_common_arguments(config),
    )


def _parallel_arguments(parallel: ParallelConfig) -> dict[str, Any]:
    virtual = parallel.virtual_pipeline_model_parallel_size
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual,
        "num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        "sequence_parallel": parallel.sequence_parallel,
        "overlap_p2p_comm": parallel.overlap_p2p_comm,
        "batch_p2p_comm": not parallel.overlap_p2p_comm,
        # Freed at once, an output that gloo is still sending in the background would be overwritten (measured: another
        # loss with a virtual pipeline on the host); without one the schedules wait for each send first.
        "deallocate_pipeline_outputs": parallel.pipeline_model_parallel_size > 1 and virtual is None,
    }


def _recompute_arguments(recompute: str) -> dict[str, Any]:
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _common_arguments(config: TrainConfig) -> dict[str, Any]:
    dtype = _DTYPES[config.training.precision]
    return {
        # The full weight is drawn on the CPU and sliced: the same values for every tensor-parallel size.
        "use_cpu_initialization": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        # A micro-batch returns a sum and a count; finalize_model_grads divides once by the global count.
        "calculate_per_token_loss": True,
        # These are torch.compile or CUDA extensions: no gain on the host, not needed beside transformer-engine.
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
        "cross_entropy_loss_fusion": False,
    }
