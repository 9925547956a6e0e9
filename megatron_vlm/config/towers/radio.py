"""The vision transformer of AM-RADIO as it is used after its distillation: fixed position embeddings, no heads.

Published sizes (v2.5, patches of 16 pixels; layers, width, heads, width of the MLP): B 12, 768, 12, 3072;
L 24, 1024, 16, 4096; H 32, 1280, 16, 5120. Preferred images have 768 pixels; 432 give the 27 x 27 patches of SigLIP.
Position embeddings are cropped at random only while a RADIO is distilled, which this tower does not do: it learns with
the crop of inference.

Source: AM-RADIO, arXiv:2312.06709; v2.5: arXiv:2412.07679.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_vlm.config.checks import check_not_negative, check_positive
from megatron_vlm.config.comparison import FREE, IN_NEW_STAGE
from megatron_vlm.config.errors import ConfigError
from megatron_vlm.config.vision_transformer import Architecture, VisionTransformerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(VisionTransformerConfig):
    """Sizes of the encoder and of its input image."""

    type: Literal["radio"] = "radio"
    image_size: int = 432
    patch_size: int = 16
    feature_layer: int = -1
    position_grid: Annotated[int, IN_NEW_STAGE] = 128
    """Patches along a side of the table of position embeddings: that of the largest image, 2048 pixels. The table is
    resized to the longer side of an image, and the upper left of it is used."""
    num_class_tokens: int = 4
    """Learned tokens before the patches, one for each teacher; without positions, and never part of the output."""
    num_registers: int = 4
    """Learned tokens after those."""
    summary_tokens: Annotated[tuple[int, ...], FREE] = (0, 1, 2)
    """Class tokens that make up the summary of an image, which the projection does not get."""
    # The model normalises its input itself, as CLIP does.
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        VisionTransformerConfig.__post_init__(self)
        check_positive("model.vision", self, "position_grid", "num_class_tokens")
        check_not_negative("model.vision", self, "num_registers")
        if self.constant_grid.rows > self.position_grid:
            raise ConfigError(
                f"model.vision.image_size={self.image_size} has {self.constant_grid.rows} patches along a side, more "
                f"than position_grid={self.position_grid}",
                fix=f"choose at most {self.position_grid * self.patch_size}",
            )
        if not set(self.summary_tokens) <= set(range(self.num_class_tokens)):
            raise ConfigError(
                f"model.vision.summary_tokens={list(self.summary_tokens)} are not all class tokens",
                fix=f"choose from 0 to {self.num_class_tokens - 1}",
            )

    @property
    def architecture(self) -> Architecture:
        """Tokens without positions before the patches, and no norm outside the layers."""
        return Architecture(
            activation="gelu",
            class_token=False,
            num_registers=self.num_class_tokens + self.num_registers,
            patch_bias=False,
        )
