"""The positions of a micro-batch by what stands there: text or image embeddings."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowKinds:
    """Which rows of the flattened sequence [s * b] are text, and which are images."""

    order: Tensor
    """int64[t]; rows of text, then rows of images, each ascending."""
    inverse: Tensor
    """int64[t]; where each row of the sequence stands in `order`."""
    num_image_rows: int

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the text rows and the image rows of float[t, c]."""
        num_text = self.order.numel() - self.num_image_rows
        return x.index_select(0, self.order[:num_text]), x.index_select(0, self.order[num_text:])

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """Return float[t, c], with each row in its place."""
        return torch.cat((text, image)).index_select(0, self.inverse)


def sort_rows(image_token_index: Tensor, num_rows: int) -> RowKinds:
    """Sort the rows of a micro-batch by kind, without a wait for the device.

    Args:
        image_token_index: int64[k]; image positions in the flattened sequence, in any order, each once.
        num_rows: t, positions of the flattened sequence.
    """
    is_image = torch.zeros(num_rows, dtype=torch.int8, device=image_token_index.device)
    is_image[image_token_index] = 1
    order = is_image.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(num_rows, device=order.device)
    return RowKinds(order, inverse, image_token_index.numel())
