"""Image features to language-model embeddings."""

from typing import Any

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.config import ProjectionConfig
from megatron_vlm.models.layers.specs import mlp_submodules

ProcessGroup = torch.distributed.ProcessGroup
_MEGATRON_TYPES = {"linear": "affine", "mlp2x_gelu": "mlp"}


class VisionProjection(MultimodalProjector):
    """One linear layer (the paper), or two with an exact GELU between (LLaVA-1.5); whole on every rank.

    Args:
        config: megatron-core's config; its hidden_size is that of the language model.
        projection_config: which of the two.
        input_size: width of the image features.
        tp_group: a group of this rank alone.
        replica_group: all ranks that hold the same projection.

    Source: VILA, arXiv:2312.07533, section 3.1; LLaVA-1.5, arXiv:2310.03744, section 3.3.
    """

    def __init__(
        self,
        config: TransformerConfig,
        projection_config: ProjectionConfig,
        input_size: int,
        *,
        tp_group: ProcessGroup,
        replica_group: ProcessGroup,
    ) -> None:
        kind = _MEGATRON_TYPES[projection_config.type]
        super().__init__(config, mlp_submodules(), kind, input_size, tp_group=tp_group)
        self.tp_group, self.replica_group = tp_group, replica_group

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the checkpoint's view of the projection, held once for all replicas."""
        metadata = {**(metadata or {}), "dp_cp_group": self.replica_group}
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)
