"""megatron-core's multimodal projector, whole on every rank."""

import torch.nn.functional as F
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.models.computation import Computation
from megatron_vlm.models.layers.replicas import ReplicaGroups, Replicated
from megatron_vlm.models.layers.specs import mlp_submodules


class Projection(Replicated, MultimodalProjector):
    """Maps image features to language-model embeddings with one of megatron-core's projectors.

    Args:
        kind: megatron-core's name: "affine" for one linear layer, "mlp" for two with a GELU between them.
        computation: precision.
        groups: process groups of the replicas.
        input_size: width of the image features.
        output_size: width of the language model and of the hidden layer.
        init_method_std: standard deviation of the initial weights.
    """

    def __init__(
        self,
        kind: str,
        computation: Computation,
        groups: ReplicaGroups,
        *,
        input_size: int,
        output_size: int,
        init_method_std: float,
    ) -> None:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=output_size,
            ffn_hidden_size=output_size,
            num_attention_heads=1,  # required, although there is no attention
            init_method_std=init_method_std,
            add_bias_linear=True,
            activation_func=F.gelu,
            **computation.common_arguments(),
        )
        super().__init__(config, mlp_submodules(), kind, input_size, tp_group=groups.own)
        self.groups, self.tp_group = groups, groups.own
