"""The vision transformer of DINOv2, with or without registers.

Its table of position embeddings keeps the grid of the published weights (37 x 37: 518 pixels in patches of 14) and is
resized to that of `image_size` in every forward pass, as in transformers' Dinov2Model.

Source: DINOv2, arXiv:2304.07193; registers: arXiv:2309.16588.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_vlm.config.checks import check_not_negative, check_positive
from megatron_vlm.config.comparison import IN_NEW_STAGE
from megatron_vlm.config.vision_transformer import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Architecture,
    VisionTransformerConfig,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(VisionTransformerConfig):
    """Sizes of the encoder and of its input image."""

    type: Literal["dinov2"] = "dinov2"
    image_size: int = 518
    patch_size: int = 14
    position_grid: Annotated[int, IN_NEW_STAGE] = 37
    """Patches along a side of the table of position embeddings."""
    feature_layer: int = -1
    post_norm: Annotated[bool, IN_NEW_STAGE] = True
    """Whether the features pass the norm that follows the last layer. With `feature_layer: -1` they are then
    `last_hidden_state` of transformers (`x_norm_patchtokens` of DINOv2's own code), without it `hidden_states[-1]`."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """swiglu for ViT-g/14."""
    num_registers: int = 0
    """4 in the published models with registers, whose positions are smoothed when they are resized."""
    drop_class_token: Annotated[bool, IN_NEW_STAGE] = True
    """Whether the feature of the class token is left out of the output; those of registers always are."""
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        VisionTransformerConfig.__post_init__(self)
        check_positive("model.vision", self, "position_grid")
        check_not_negative("model.vision", self, "num_registers")

    @property
    def architecture(self) -> Architecture:
        """LayerScale, and tokens and norm as set."""
        return Architecture(
            activation=self.activation,
            drop_class_token=self.drop_class_token,
            num_registers=self.num_registers,
            post_norm=self.post_norm,
            layer_scale=1.0,
            antialias_positions=self.num_registers > 0,
        )
