"""The vision transformer of InternVL; the defaults are those of InternViT-6B-448px-V1-2, the tower of VILA-1.5 40B.

InternViT-300M has `normalization: LayerNorm`, `qk_layernorm: false` and `add_qkv_bias: true`.

Source: InternVL, arXiv:2312.14238, section 3.2.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

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

    type: Literal["internvit"] = "internvit"
    image_size: int = 448
    patch_size: int = 14
    num_layers: int = 45
    hidden_size: int = 3200
    ffn_hidden_size: int = 12800
    num_attention_heads: int = 25
    feature_layer: int = -1
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    qk_layernorm: bool = True
    """Whether queries and keys pass an RMSNorm over all heads together."""
    add_qkv_bias: bool = False
    drop_class_token: Annotated[bool, IN_NEW_STAGE] = True
    """Whether the feature of the class token is left out of the output."""
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD

    @property
    def architecture(self) -> Architecture:
        """LayerScale, and norms and biases as set."""
        return Architecture(
            activation="gelu",
            normalization=self.normalization,
            drop_class_token=self.drop_class_token,
            add_qkv_bias=self.add_qkv_bias,
            qk_layernorm=self.qk_layernorm,
            layer_scale=0.1,
        )
