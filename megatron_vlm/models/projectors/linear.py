"""One linear layer with a bias."""

from megatron_vlm.config.grid import Grid
from megatron_vlm.config.projectors.linear import Config
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.layers.projection import Projection
from megatron_vlm.models.layers.replicas import ReplicaGroups


def build(
    config: Config,
    computation: Computation,
    groups: ReplicaGroups,
    *,
    patches: Grid,
    input_size: int,
    output_size: int,
    init_method_std: float,
) -> Projection:
    """Build the projection."""
    return Projection(
        "affine",
        computation,
        groups,
        input_size=input_size,
        output_size=output_size,
        init_method_std=init_method_std,
    )
