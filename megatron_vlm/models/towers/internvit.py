"""The vision transformer of InternVL."""

from megatron_vlm.config.towers.internvit import Config
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.layers.replicas import ReplicaGroups
from megatron_vlm.models.layers.vision_transformer import VisionTransformer


def build(config: Config, computation: Computation, groups: ReplicaGroups) -> VisionTransformer:
    """Build the tower."""
    return VisionTransformer(config, computation, groups)
