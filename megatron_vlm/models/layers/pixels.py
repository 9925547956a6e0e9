"""From pixels as they are loaded to the input of a tower."""

import torch
from torch import Tensor

Colour = tuple[float, float, float]


class PixelNormaliser:
    """Normalises uint8 pixels on their device.

    Its numbers are not buffers of a module: a bf16 model would round them, the mean of 122.7 by up to half a level.

    Args:
        mean: of red, green and blue, in the range 0 to 1.
        std: likewise.
    """

    def __init__(self, mean: Colour, std: Colour) -> None:
        self._numbers = (mean, std)
        self._mean_and_std: Tensor | None = None

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Return float32[n, 3, H, W] for uint8 pixels; float pixels are returned as they are, already normalised."""
        if pixel_values.dtype != torch.uint8:
            return pixel_values
        if self._mean_and_std is None or self._mean_and_std.device != pixel_values.device:
            # Kept: each copy from the host would wait for the device.
            self._mean_and_std = torch.tensor(self._numbers, device=pixel_values.device).view(2, 1, 3, 1, 1) * 255
        mean, std = self._mean_and_std
        return (pixel_values.float() - mean) / std
