"""The vision transformer of SigLIP; the defaults are those of so400m-patch14-384, the tower of VILA-1.5.

384 pixels hold 27 patches a side; the 6 pixels left over at the right and at the bottom are not read.

Source: SigLIP, arXiv:2303.15343; sizes: SoViT-400m, arXiv:2305.13035.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_vlm.config.errors import ConfigError
from megatron_vlm.config.vision_transformer import Architecture, VisionTransformerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(VisionTransformerConfig):
    """Sizes of the encoder and of its input image."""

    type: Literal["siglip"] = "siglip"
    image_size: int = 384
    patch_size: int = 14
    num_layers: int = 27
    hidden_size: int = 1152
    ffn_hidden_size: int = 4304
    num_attention_heads: int = 16
    feature_layer: int = -2
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def check_image_size(self) -> None:
        """Check that the image holds a patch.

        Raises:
            ConfigError: it does not.
        """
        if self.image_size < self.patch_size:
            raise ConfigError(
                f"model.vision.image_size={self.image_size} is less than patch_size={self.patch_size}",
                fix="choose a larger image",
            )

    @property
    def architecture(self) -> Architecture:
        """No class token; the norm after the last layer belongs to the pooling, which is not used here."""
        return Architecture(activation="gelu_tanh", class_token=False)
