"""The vision transformer of AM-RADIO, for inference and for training with fixed position embeddings.

Source: AM-RADIO, arXiv:2312.06709, and its code in NVlabs/RADIO.
"""

from torch import Tensor

from megatron_vlm.config.towers.radio import Config
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.layers.position_embeddings import PositionEmbeddings, resize_positions
from megatron_vlm.models.layers.replicas import ReplicaGroups
from megatron_vlm.models.layers.vision_transformer import VisionTransformer


def build(config: Config, computation: Computation, groups: ReplicaGroups) -> "Radio":
    """Build the tower."""
    return Radio(config, computation, groups)


class CroppedPositionEmbeddings(PositionEmbeddings):
    """The table of the largest image, resized bilinearly to the longer side of another one and cropped to it."""

    def forward(self, rows: int, columns: int) -> Tensor:  # type: ignore[override]
        """Return float[rows * columns, h], the upper left of the resized table."""
        side = max(rows, columns)
        resized = resize_positions(self.weight, self.grid, side, side, mode="bilinear")
        return resized.view(side, side, -1)[:rows, :columns].flatten(0, 1)

    def can_resize(self, shape: tuple[int, ...]) -> bool:
        """Return False: the size of the table does not depend on the image size."""
        return False


class Radio(VisionTransformer):
    """Maps pixels to patch features; the class tokens and registers before them are left out."""

    vision_config: Config
    positions = CroppedPositionEmbeddings

    def summarise(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what RADIO itself returns.

        Args:
            pixel_values: as in `forward`.

        Returns:
            The summary float[n, k * h] of k class tokens side by side, and the features float[n, p, h].
        """
        tokens = self.encode(pixel_values)
        summary = tokens[:, list(self.vision_config.summary_tokens)].flatten(1)
        return summary, tokens[:, self.vision_config.num_prefix_tokens :]
