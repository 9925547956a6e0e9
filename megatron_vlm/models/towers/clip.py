"""A CLIP-style vision transformer on megatron-core's TransformerBlock."""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlm.config.towers.clip import Config
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.layers.activations import ACTIVATIONS
from megatron_vlm.models.layers.gradients import keep_gradient_path
from megatron_vlm.models.layers.norm import Norm
from megatron_vlm.models.layers.replicas import ReplicaGroups, Replicated
from megatron_vlm.models.layers.specs import vision_block_spec


def build(config: Config, computation: Computation, groups: ReplicaGroups) -> "VisionModel":
    """Build the tower."""
    return VisionModel(_transformer_config(config, computation), config, groups)


def _transformer_config(config: Config, computation: Computation) -> TransformerConfig:
    return TransformerConfig(
        num_layers=config.num_layers_run,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        layernorm_epsilon=config.layernorm_epsilon,
        init_method_std=config.init_method_std,
        normalization="LayerNorm",
        add_bias_linear=True,
        activation_func=ACTIVATIONS[config.activation],
        # Recomputing only the attention core saves little in a tower with a few hundred tokens per image.
        **computation.recompute_arguments(selective=False),
        **computation.common_arguments(),
    )


class PositionEmbeddings(torch.nn.Embedding):
    """One embedding for each class token and each patch of a square grid.

    Args:
        grid: patches along a side.
        num_class_tokens: embeddings before those of the patches.
        hidden_size: width of an embedding.
        dtype: of the weights.
    """

    def __init__(self, grid: int, num_class_tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__(grid**2 + num_class_tokens, hidden_size, dtype=dtype)
        self.grid, self.num_class_tokens = grid, num_class_tokens

    def forward(self, rows: int, columns: int) -> Tensor:  # type: ignore[override]
        """Return float[class tokens + rows * columns, h], interpolated if the grid of the image is another one."""
        weight = self.weight
        if (rows, columns) == (self.grid, self.grid):
            return weight
        square = weight[self.num_class_tokens :].reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(square.float(), size=(rows, columns), mode="bicubic", align_corners=False)
        resized = resized.permute(0, 2, 3, 1).reshape(rows * columns, -1).to(weight.dtype)
        return torch.cat([weight[: self.num_class_tokens], resized])


class VisionModel(Replicated):
    """Maps pixels to patch features: the hidden state chosen by `feature_layer`, without the class token.

    Args:
        config: megatron-core's config for the layers that run.
        vision_config: settings of the tower.
        groups: process groups of the replicas.
    """

    def __init__(self, config: TransformerConfig, vision_config: Config, groups: ReplicaGroups) -> None:
        super().__init__(config=config)
        self.vision_config = vision_config
        self.groups, self.tp_group = groups, groups.own
        hidden_size, dtype = config.hidden_size, config.params_dtype
        patch, grid = vision_config.patch_size, vision_config.constant_grid.rows
        self.num_class_tokens = int(vision_config.class_token)
        self.conv1 = torch.nn.Conv2d(3, hidden_size, patch, patch, bias=not vision_config.class_token, dtype=dtype)
        self.position_embeddings = PositionEmbeddings(grid, self.num_class_tokens, hidden_size, dtype)
        self.class_token = None
        if vision_config.class_token:
            self.class_token = torch.nn.Parameter(torch.empty(1, 1, hidden_size, dtype=dtype))
        self.ln_pre = Norm(config, hidden_size, config.layernorm_epsilon) if vision_config.pre_norm else None
        collection = ProcessGroupCollection(tp=groups.own, cp=groups.own, pp=groups.own)
        self.decoder = TransformerBlock(
            config,
            vision_block_spec(config, groups.own),
            pre_process=True,
            post_process=False,
            pg_collection=collection,
        )
        # Not buffers: a bf16 model would round them, the mean of 122.7 by up to half a level.
        self._mean_and_std: Tensor | None = None
        self._initialise(vision_config.init_method_std)

    def _initialise(self, std: float) -> None:
        """Draw the embeddings; normalised pixels have unit scale, so conv1 is scaled by its fan-in."""
        torch.nn.init.normal_(self.conv1.weight, std=self.conv1.weight[0].numel() ** -0.5)
        if self.conv1.bias is not None:
            torch.nn.init.zeros_(self.conv1.bias)
        torch.nn.init.normal_(self.position_embeddings.weight, std=std)
        if self.class_token is not None:
            torch.nn.init.normal_(self.class_token, std=std)

    def normalise(self, pixel_values: Tensor) -> Tensor:
        """Normalise uint8 pixels to the dtype of the model; float pixels are assumed to be normalised already."""
        dtype = self.config.params_dtype
        if pixel_values.dtype != torch.uint8:
            return pixel_values.to(dtype)
        if self._mean_and_std is None or self._mean_and_std.device != pixel_values.device:
            both = [self.vision_config.image_mean, self.vision_config.image_std]
            self._mean_and_std = torch.tensor(both, device=pixel_values.device).view(2, 1, 3, 1, 1) * 255
        mean, std = self._mean_and_std
        return ((pixel_values.float() - mean) / std).to(dtype)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixel_values: uint8[n, 3, H, W] as loaded, or float if already normalised; H and W are multiples of
                `patch_size`.

        Returns:
            float[n, p, h] with p = H * W / patch_size**2; the patches are row by row.
        """
        patches = self.conv1(self.normalise(pixel_values))  # [n, h, H / patch, W / patch]
        rows, columns = patches.shape[-2:]
        x = patches.flatten(2).transpose(1, 2)  # [n, p, h]
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.size(0), -1, -1), x], dim=1)
        x = x + self.position_embeddings(rows, columns)
        if self.ln_pre is not None:
            x = self.ln_pre(x)
        x = x.transpose(0, 1).contiguous()  # [n, s, h] -> [s, n, h]
        x = keep_gradient_path(x, self.decoder)
        x = self.decoder(hidden_states=x, attention_mask=None)
        return x.transpose(0, 1)[:, self.num_class_tokens :]
