"""The vision transformer of OpenAI's CLIP; the defaults are those of ViT-L/14 at 336 pixels.

Source: CLIP, arXiv:2103.00020.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_vlm.config.comparison import IN_NEW_STAGE
from megatron_vlm.config.vision_transformer import Architecture, VisionTransformerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(VisionTransformerConfig):
    """Sizes of the encoder and of its input image."""

    type: Literal["clip"] = "clip"
    image_size: int = 336
    patch_size: int = 14
    feature_layer: int = -2
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"
    drop_class_token: Annotated[bool, IN_NEW_STAGE] = True
    """Whether the feature of the class token is left out of the output."""
    layernorm_epsilon: float = 1e-5
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def architecture(self) -> Architecture:
        """A norm before the first layer, and no bias in the patch embedding."""
        return Architecture(
            activation=self.activation, drop_class_token=self.drop_class_token, patch_bias=False, pre_norm=True
        )
