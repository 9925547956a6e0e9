"""Transformer layers in which every feature attends to every other, between two linear layers."""

import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlm.config.grid import Grid
from megatron_vlm.config.projectors.transformer_block import Config
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.layers.norm import Norm
from megatron_vlm.models.layers.projection import Projection
from megatron_vlm.models.layers.replicas import ReplicaGroups, Replicated
from megatron_vlm.models.layers.specs import torch_layer_spec


def build(
    config: Config,
    computation: Computation,
    groups: ReplicaGroups,
    *,
    patches: Grid,
    input_size: int,
    output_size: int,
    init_method_std: float,
) -> "TransformerProjection":
    """Build the projection."""
    std = {"init_method_std": init_method_std}
    linear_in, linear_out = (
        Projection("affine", computation, groups, input_size=inputs, output_size=outputs, **std)
        for inputs, outputs in ((input_size, config.hidden_size), (config.hidden_size, output_size))
    )
    transformer = TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_width,
        num_attention_heads=config.num_attention_heads,
        layernorm_epsilon=config.layernorm_epsilon,
        add_bias_linear=True,
        activation_func=F.gelu,
        **std,
        **computation.common_arguments(),
    )
    return TransformerProjection(transformer, groups, linear_in, linear_out)


class TransformerProjection(Replicated):
    """Maps features to embeddings; every feature sees those of the whole image.

    Args:
        config: megatron-core's config of the layers.
        groups: process groups of the replicas.
        linear_in: from the width of the features to that of the layers.
        linear_out: from there to the width of the embeddings.
    """

    def __init__(
        self, config: TransformerConfig, groups: ReplicaGroups, linear_in: Projection, linear_out: Projection
    ) -> None:
        super().__init__(config=config)
        self.groups, self.tp_group = groups, groups.own
        layer = torch_layer_spec(AttnMaskType.no_mask, tp_group=groups.own)
        self.linear_in = linear_in
        self.decoder = TransformerBlock(
            config,
            TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=Norm),
            pre_process=True,
            post_process=False,
            pg_collection=ProcessGroupCollection(tp=groups.own, cp=groups.own, pp=groups.own),
        )
        self.norm = Norm(config, config.hidden_size, config.layernorm_epsilon)
        self.linear_out = linear_out

    def forward(self, features: Tensor) -> Tensor:
        """Map float[n, p, c] to float[n, p, h]."""
        x = self.linear_in(features).transpose(0, 1).contiguous()  # [n, p, h] -> [p, n, h]
        x = self.decoder(hidden_states=x, attention_mask=None).transpose(0, 1)
        return self.linear_out(self.norm(x))
