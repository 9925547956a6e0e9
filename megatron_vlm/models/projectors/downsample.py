"""2 x 2 neighbouring patches side by side, then one linear layer."""

from torch import Tensor

from megatron_vlm.config.grid import Grid
from megatron_vlm.config.projectors.downsample import Config
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.layers.merge import merge_patches
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
) -> "Downsample":
    """Build the projection."""
    return Downsample(
        config, patches, computation, groups, input_size=input_size, output_size=output_size, std=init_method_std
    )


class Downsample(Projection):
    """Maps merged patches to embeddings.

    Args:
        config: settings of the projection.
        patches: grid of the features.
        computation: precision.
        groups: process groups of the replicas.
        input_size: width of the features.
        output_size: width of the embeddings.
        std: standard deviation of the initial weights.
    """

    def __init__(
        self,
        config: Config,
        patches: Grid,
        computation: Computation,
        groups: ReplicaGroups,
        *,
        input_size: int,
        output_size: int,
        std: float,
    ) -> None:
        super().__init__(
            "affine",
            computation,
            groups,
            input_size=4 * input_size,
            output_size=output_size,
            init_method_std=std,
        )
        self.patches, self.token_order = patches, config.token_order

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map float[n, p, c] to float[n, t, h]."""
        return super().forward(merge_patches(hidden_states, self.patches, self.token_order))
