"""Layer specs: the modules that megatron-core's transformer layers are made of."""

import importlib.util
import logging
from typing import Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_vlm.config import ConfigError
from megatron_vlm.config.vision_transformer import Architecture
from megatron_vlm.models.layers.attention import PackedAttention
from megatron_vlm.models.layers.layer_scale import LayerScale
from megatron_vlm.models.layers.linear import ColumnLinear, ColumnLinearWithoutBias, RowLinear
from megatron_vlm.models.layers.mlp import FusedMLP
from megatron_vlm.models.layers.norm import Norm, NormOfAllHeads
from megatron_vlm.models.layers.rotary import RotarySelfAttention
from megatron_vlm.platform.machine import pick_backend

logger = logging.getLogger(__name__)

Backend = Literal["torch", "transformer_engine"]

# From this compute capability on, cuDNN has a kernel for packed samples (transformer-engine's layout "thd").
_CUDNN_PACKS_FROM = (9, 0)

NORM_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""The names of the norms in transformer-engine's fused norm + linear modules, and in checkpoints."""


def choose_backend(backend: Literal["auto", "torch", "transformer_engine"]) -> Backend:
    """Return the layer implementation to use.

    Raises:
        ConfigError: transformer-engine is requested, but it is not installed or there is no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if backend == "transformer_engine" and pick_backend("auto", has_gpu=has_gpu) != backend:
        raise ConfigError(
            "model.backend=transformer_engine, but transformer-engine is not installed or there is no GPU",
            fix="set model.backend=auto, or install megatron_vlm[gpu] on a GPU machine",
        )
    return pick_backend(backend, has_gpu=has_gpu)


def needs_packed_attention() -> bool:
    """Return whether transformer-engine has no fast attention for packed samples on this GPU.

    Before Hopper it takes them only to the package flash-attn. Without it, some of its versions refuse to run and
    others compute all scores of a row.
    """
    return torch.cuda.get_device_capability() < _CUDNN_PACKS_FROM and importlib.util.find_spec("flash_attn") is None


def mlp_submodules() -> MLPSubmodules:
    """Return the two linear modules of an MLP."""
    return MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)


def torch_layer_spec(
    attn_mask_type: AttnMaskType,
    self_attention: type[SelfAttention] = SelfAttention,
    tp_group: torch.distributed.ProcessGroup | None = None,
) -> ModuleSpec:
    """Return a transformer layer of torch modules with the checkpoint keys of transformer-engine's layer.

    The mask is an argument because megatron-core's own ViT layer without transformer-engine is causal.
    """
    attention = ModuleSpec(
        module=self_attention,
        params={"attn_mask_type": attn_mask_type},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnLinear,
            core_attention=PackedAttention,
            linear_proj=RowLinear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=FusedMLP.of_group(mlp_submodules(), tp_group),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(NORM_KEYS),
        ),
    )


def rotates_by_table(config: TransformerConfig, backend: Backend) -> bool:
    """Return whether the decoder's layers take a `rotary_table`: megatron-core's rotation is left out."""
    return backend == "torch" or config.context_parallel_size > 1


def transformer_engine_layer_spec(context_parallel_size: int = 1) -> ModuleSpec:
    """Return a causal transformer layer of transformer-engine's modules, with an attention core that fits this GPU.

    With context parallelism, rotation and attention core are ours: transformer-engine's cut each sample into chunks.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    layer = get_gpt_layer_with_transformer_engine_spec()
    attention = layer.submodules.self_attention
    if context_parallel_size > 1:
        attention.module = RotarySelfAttention
    if context_parallel_size > 1 or needs_packed_attention():
        attention.submodules.core_attention = PackedAttention
    return layer


def vision_block_spec(
    config: TransformerConfig, architecture: Architecture, tp_group: torch.distributed.ProcessGroup
) -> TransformerBlockSubmodules:
    """Return the layers of a vision tower; every patch attends to every patch."""
    layer = torch_layer_spec(AttnMaskType.no_mask, tp_group=tp_group)
    submodules, attention = layer.submodules, layer.submodules.self_attention.submodules
    if architecture.qk_layernorm:
        norm = ModuleSpec(module=NormOfAllHeads, params={"tp_group": tp_group})
        attention.q_layernorm = attention.k_layernorm = norm
    if not architecture.add_qkv_bias:
        attention.linear_qkv = ColumnLinearWithoutBias
    if architecture.layer_scale is not None:
        scale = {"hidden_size": config.hidden_size, "init": architecture.layer_scale, "dtype": config.params_dtype}
        submodules.self_attn_bda = submodules.mlp_bda = ModuleSpec(module=LayerScale, params=scale)
    return TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=Norm)


def language_block_spec(
    config: TransformerConfig, backend: Backend, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Return the decoder layers of this pipeline stage and the final norm."""
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    if backend == "torch":
        layer, norm = torch_layer_spec(AttnMaskType.causal, RotarySelfAttention), Norm
    else:
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = transformer_engine_layer_spec(config.context_parallel_size), TENorm
        if needs_packed_attention() and not vp_stage:
            logger.info(
                "this GPU needs the package flash-attn for transformer-engine's attention: torch's takes its place"
            )
    # The final norm is chosen here: given only a layer, megatron-core picks one that rejects sequence parallelism.
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
