"""2 x 2 neighbouring patches side by side, a norm, and two linear layers with an exact GELU between them."""

from torch import Tensor

from megatron_vlm.config.grid import Grid
from megatron_vlm.config.projectors.mlp_downsample import Config
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.layers.merge import merge_patches
from megatron_vlm.models.layers.norm import Norm
from megatron_vlm.models.layers.projection import Projection
from megatron_vlm.models.layers.replicas import ReplicaGroups, Replicated

_EPSILON = 1e-5


def build(
    config: Config,
    computation: Computation,
    groups: ReplicaGroups,
    *,
    patches: Grid,
    input_size: int,
    output_size: int,
    init_method_std: float,
) -> "MLPDownsample":
    """Build the projection."""
    mlp = Projection(
        "mlp",
        computation,
        groups,
        input_size=4 * input_size,
        output_size=output_size,
        init_method_std=init_method_std,
    )
    return MLPDownsample(config, patches, mlp, width=4 * input_size)


class MLPDownsample(Replicated):
    """Merges, normalises and maps patches to embeddings.

    Args:
        config: settings of the projection.
        patches: grid of the features.
        mlp: the two layers.
        width: of the merged features.
    """

    def __init__(self, config: Config, patches: Grid, mlp: Projection, *, width: int) -> None:
        super().__init__(config=mlp.config)
        self.groups, self.tp_group = mlp.groups, mlp.tp_group
        self.patches, self.token_order = patches, config.token_order
        self.norm = Norm(mlp.config, width, _EPSILON)
        self.mlp = mlp

    def forward(self, features: Tensor) -> Tensor:
        """Map float[n, p, c] to float[n, t, h]."""
        return self.mlp(self.norm(merge_patches(features, self.patches, self.token_order)))
