"""A CLIP-style vision transformer on megatron-core's TransformerBlock."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlm.config import VisionConfig
from megatron_vlm.models.layers.norm import Norm
from megatron_vlm.models.layers.specs import vision_block_spec

ProcessGroup = torch.distributed.ProcessGroup


class VisionModel(MegatronModule):
    """Pixels to patch features: the hidden state that `feature_layer` names, without the class token.

    Args:
        config: megatron-core's config of the layers that run.
        vision_config: sizes of the images and patches.
        tp_group: a group of this rank alone: the tower is whole on each rank.
        replica_group: all ranks that hold the same tower; a checkpoint stores it once for them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vision_config: VisionConfig,
        *,
        tp_group: ProcessGroup,
        replica_group: ProcessGroup,
    ) -> None:
        super().__init__(config=config)
        self.vision_config = vision_config
        self.tp_group, self.replica_group = tp_group, replica_group
        hidden_size, dtype = config.hidden_size, config.params_dtype
        patch, grid = vision_config.patch_size, vision_config.image_size // vision_config.patch_size
        self.grid, self.num_class_tokens = grid, int(vision_config.class_token)
        self.conv1 = torch.nn.Conv2d(3, hidden_size, patch, patch, bias=not vision_config.class_token, dtype=dtype)
        self.position_embeddings = torch.nn.Embedding(grid**2 + self.num_class_tokens, hidden_size, dtype=dtype)
        self.class_token = None
        if vision_config.class_token:
            self.class_token = torch.nn.Parameter(torch.empty(1, 1, hidden_size, dtype=dtype))
        self.ln_pre = Norm(config, hidden_size, config.layernorm_epsilon) if vision_config.pre_norm else None
        groups = ProcessGroupCollection(tp=tp_group, cp=tp_group, pp=tp_group)
        self.decoder = TransformerBlock(
            config, vision_block_spec(config), pre_process=True, post_process=False, pg_collection=groups
        )
        # No buffers: a bf16 model would round them, and a mean of 122.7 levels by up to half a level.
        self._mean_and_std: Tensor | None = None
        self._initialise(vision_config.init_method_std)

    def _initialise(self, std: float) -> None:
        """Draw the embeddings; patches of normalised pixels have unit scale, so conv1 is scaled by its fan-in."""
        torch.nn.init.normal_(self.conv1.weight, std=self.conv1.weight[0].numel() ** -0.5)
        if self.conv1.bias is not None:
            torch.nn.init.zeros_(self.conv1.bias)
        torch.nn.init.normal_(self.position_embeddings.weight, std=std)
        if self.class_token is not None:
            torch.nn.init.normal_(self.class_token, std=std)

    def normalise(self, pixel_values: Tensor) -> Tensor:
        """Return uint8 pixels as normalised values of the model's dtype; floats are taken as normalised already."""
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
            pixel_values: uint8[n, 3, H, W] as loaded, or float already normalised; H and W multiples of the patch.

        Returns:
            float[n, p, h] with p = H * W / patch_size**2, patches row by row.
        """
        patches = self.conv1(self.normalise(pixel_values))  # [n, h, H / patch, W / patch]
        rows, columns = patches.shape[-2:]
        x = patches.flatten(2).transpose(1, 2)  # [n, p, h]
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.size(0), -1, -1), x], dim=1)
        x = x + self._positions(rows, columns)
        if self.ln_pre is not None:
            x = self.ln_pre(x)
        x = x.transpose(0, 1).contiguous()  # [n, s, h] -> [s, n, h]
        x = keep_gradient_path(x, self.decoder)
        x = self.decoder(hidden_states=x, attention_mask=None)
        return x.transpose(0, 1)[:, self.num_class_tokens :]

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Return float[class tokens + rows * columns, h], interpolated where the image has another size."""
        weight = self.position_embeddings.weight
        if (rows, columns) == (self.grid, self.grid):
            return weight
        square = weight[self.num_class_tokens :].reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(square.float(), size=(rows, columns), mode="bicubic", align_corners=False)
        resized = resized.permute(0, 2, 3, 1).reshape(rows * columns, -1).to(weight.dtype)
        return torch.cat([weight[: self.num_class_tokens], resized])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the checkpoint's view of the tower, held once for all replicas."""
        metadata = {**(metadata or {}), "dp_cp_group": self.replica_group}
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)


def keep_gradient_path(x: Tensor, module: torch.nn.Module) -> Tensor:
    """Return `x` so that a recomputed `module` still gets its gradients when nothing before it learns.

    Checkpointed layers whose input requires no gradient drop the gradients of their own weights without an error.
    """
    if torch.is_grad_enabled() and not x.requires_grad and any(p.requires_grad for p in module.parameters()):
        return x.detach().requires_grad_()
    return x
