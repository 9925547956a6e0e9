"""The vision transformer of all towers, on megatron-core's TransformerBlock."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlm.config.vision_transformer import VisionTransformerConfig
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.layers.activations import ACTIVATIONS
from megatron_vlm.models.layers.norm import Norm
from megatron_vlm.models.layers.pixels import PixelNormaliser
from megatron_vlm.models.layers.position_embeddings import PositionEmbeddings
from megatron_vlm.models.layers.replicas import ReplicaGroups, Replicated
from megatron_vlm.models.layers.specs import vision_block_spec


def _transformer_config(
    vision: VisionTransformerConfig, computation: Computation, groups: ReplicaGroups
) -> TransformerConfig:
    activation: dict[str, Any] = {"activation_func": F.silu, "gated_linear_unit": True}
    if vision.architecture.activation != "swiglu":
        activation = {"activation_func": ACTIVATIONS[vision.architecture.activation]}
    return TransformerConfig(
        num_layers=vision.num_layers_run,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        layernorm_epsilon=vision.layernorm_epsilon,
        init_method_std=vision.init_method_std,
        normalization=vision.architecture.normalization,
        add_bias_linear=True,
        tensor_model_parallel_size=groups.tensor.size(),
        **activation,
        # Recomputing only the attention core saves little in a tower with a few hundred tokens per image.
        **computation.recompute_arguments(selective=False),
        **computation.common_arguments(),
    )


class VisionTransformer(Replicated):
    """Maps pixels to features: the hidden state chosen by `feature_layer`, of the patches and maybe the class token.

    Args:
        vision_config: settings of the tower.
        computation: precision and recomputation.
        groups: process groups of the tower.
    """

    positions: type[PositionEmbeddings] = PositionEmbeddings
    """How position embeddings become those of an image."""

    def __init__(self, vision_config: VisionTransformerConfig, computation: Computation, groups: ReplicaGroups) -> None:
        config = _transformer_config(vision_config, computation, groups)
        super().__init__(config=config)
        self.vision_config = vision_config
        self.groups, self.tp_group = groups, groups.tensor
        hidden_size, dtype, special = config.hidden_size, config.params_dtype, vision_config.architecture
        patch, epsilon = vision_config.patch_size, config.layernorm_epsilon
        self.conv1 = torch.nn.Conv2d(3, hidden_size, patch, patch, bias=special.patch_bias, dtype=dtype)
        self.position_embeddings = self.positions(
            vision_config.position_grid,
            int(special.class_token),
            hidden_size,
            dtype,
            antialias=special.antialias_positions,
        )
        self.class_token = self._tokens(1) if special.class_token else None
        self.registers = self._tokens(special.num_registers) if special.num_registers else None
        self.ln_pre = Norm(config, hidden_size, epsilon) if special.pre_norm else None
        collection = ProcessGroupCollection(tp=groups.tensor, cp=groups.own, pp=groups.own)
        self.decoder = TransformerBlock(
            config,
            vision_block_spec(config, special, groups.tensor),
            pre_process=True,
            post_process=False,
            pg_collection=collection,
        )
        self.ln_post = Norm(config, hidden_size, epsilon) if special.post_norm else None
        self._normalise = PixelNormaliser(vision_config.image_mean, vision_config.image_std)
        self._initialise(vision_config.init_method_std)

    def _tokens(self, number: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.empty(1, number, self.config.hidden_size, dtype=self.config.params_dtype))

    def _initialise(self, std: float) -> None:
        """Draw the embeddings; normalised pixels have unit scale, so conv1 is scaled by its fan-in."""
        torch.nn.init.normal_(self.conv1.weight, std=self.conv1.weight[0].numel() ** -0.5)
        if self.conv1.bias is not None:
            torch.nn.init.zeros_(self.conv1.bias)
        torch.nn.init.normal_(self.position_embeddings.weight, std=std)
        for tokens in (self.class_token, self.registers):
            if tokens is not None:
                torch.nn.init.normal_(tokens, std=std)

    def normalise(self, pixel_values: Tensor) -> Tensor:
        """Normalise uint8 pixels to the dtype of the model; float pixels are assumed to be normalised already."""
        return self._normalise(pixel_values).to(self.config.params_dtype)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return float[n, s, h], the input of the first layer: class token, registers, then patches row by row."""
        patches = self.conv1(self.normalise(pixel_values))  # [n, h, H / patch, W / patch]
        rows, columns = patches.shape[-2:]
        x = patches.flatten(2).transpose(1, 2)  # [n, p, h]
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.size(0), -1, -1), x], dim=1)
        x = x + self.position_embeddings(rows, columns)
        if self.registers is not None:
            first = self.position_embeddings.num_class_tokens
            x = torch.cat([x[:, :first], self.registers.expand(x.size(0), -1, -1), x[:, first:]], dim=1)
        return x if self.ln_pre is None else self.ln_pre(x)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return float[n, s, h], all tokens of the chosen hidden state; see `forward`."""
        x = self.embed(pixel_values).transpose(0, 1).contiguous()  # [n, s, h] -> [s, n, h]
        x = self.decoder(hidden_states=x, attention_mask=None).transpose(0, 1)
        return x if self.ln_post is None else self.ln_post(x)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixel_values: uint8[n, 3, H, W] as loaded, or float if already normalised. Pixels to the right of the last
                whole patch and below it are not read.

        Returns:
            float[n, p, h], in the order of `constant_grid`: the patches are row by row, after the class token if it is
            kept.
        """
        x = self.encode(pixel_values)
        prefix, kept = self.vision_config.num_prefix_tokens, self.vision_config.constant_grid.num_prefix_tokens
        if kept == prefix:
            return x
        patches = x[:, prefix:]
        return torch.cat([x[:, :kept], patches], dim=1) if kept else patches
