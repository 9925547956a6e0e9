"""Decode an image to the square of uint8 pixels that the vision tower takes.

The result equals that of the Hugging Face processors of CLIP and SigLIP on Pillow 13, whichever Pillow is installed,
before normalisation, which runs on the device: the mean difference is below 0.01 of 255 levels, and no pixel differs by
more than 2. Older Pillow always filters along the rows first; on images that Pillow 13 filters along the columns first
(see `_shrinks_tall`), it differs by up to 0.3 levels on average and 4 in a pixel. With simplejpeg and torch's bicubic
filter on uint8, JPEG files take a third of the time of the CLIP processor. Decoding at a reduced size would be faster
still for large photos, but shifts the mean by 0.2 to 0.5 levels, so it is not done.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_vlm.config.prepare import ImageLimits
from megatron_vlm.data.images.decoding import check_limits, decode_rgb, find_orientation, has_jpeg_metadata
from megatron_vlm.data.images.formats import JPEG, find_format

Aspect = Literal["pad", "square", "resize"]

_upsample = torch.ops.aten._upsample_bicubic2d_aa.default
# Adobe's other colour spaces need the handling that Pillow has.
_PLAIN_JPEG = ("YCbCr", "Gray")


def decode_image(
    encoded: bytes,
    *,
    image_size: int,
    aspect: Aspect,
    mean: Sequence[float],
    limits: ImageLimits | None = None,
) -> np.ndarray:
    """Decode one image to a square.

    Transparent images are composed on white, 16-bit images are scaled to 8 bits, EXIF orientation is applied, and of an
    animation the first frame is used.

    Args:
        encoded: JPEG, PNG, WEBP or GIF file; recognised by content.
        image_size: side of the result [pixels].
        aspect: pad with the mean colour; crop the centre (CLIP's own processing); stretch to the square.
        mean: mean colour of the tower, 0 to 1 per channel; used by "pad" only.
        limits: header limits; None: those of `ImageLimits`.

    Returns:
        uint8[3, image_size, image_size].

    Raises:
        DataError: the bytes are not such an image, are damaged, or exceed the limits.

    Source: transformers CLIPImageProcessor for "square", SiglipImageProcessor for "resize"; LLaVA-1.5, `expand2square`
    of llava/mm_utils.py for "pad".
    """
    limits = limits or ImageLimits()
    pixels = _decode_jpeg(encoded, limits)
    if pixels is None:
        pixels = np.array(decode_rgb(encoded, limits=limits))
    # The decoder's [height, width, channel] is torch's channels_last, for which its filter is fastest.
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if aspect == "pad":
        square = _pad(image, image_size, mean)
    elif aspect == "square":
        square = _crop_centre(image, image_size)
    else:
        square = _resize(image, image_size, image_size)
    return np.ascontiguousarray(square[0].numpy())


def _decode_jpeg(encoded: bytes, limits: ImageLimits) -> np.ndarray | None:
    """Decode an ordinary JPEG, uint8[height, width, 3]; None for any other image.

    Raises:
        DataError: the image exceeds the limits.
    """
    if find_format(encoded) is not JPEG:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return None
    check_limits(width, height, limits)
    if colours not in _PLAIN_JPEG or (has_jpeg_metadata(encoded) and find_orientation(encoded) != 1):
        return None
    try:
        return simplejpeg.decode_jpeg(encoded, "RGB")
    except ValueError:
        # Damaged or merely unusual: let Pillow decide.
        return None


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[-2:] == (height, width):
        return image
    if _shrinks_tall(image, height, width):
        image = F.interpolate(image, (height, image.shape[-1]), mode="bicubic", antialias=True)
    return F.interpolate(image, (height, width), mode="bicubic", antialias=True)


def _shrinks_tall(image: Tensor, height: int, width: int) -> bool:
    """Whether Pillow filters along the columns first; torch always filters along the rows first.

    Source: Pillow 13.0, https://github.com/python-pillow/Pillow/pull/9549.
    """
    saved = image.shape[-1] - width
    return saved != 0 and image.shape[-2] - height > 2 * max(saved, 0)


def _pad(image: Tensor, size: int, mean: Sequence[float]) -> Tensor:
    height, width = image.shape[-2:]
    if height == width:
        return _resize(image, size, size)
    colour = torch.from_numpy(mean_colour(mean))
    if height < width:
        # The filter works along rows first, where bars at top and bottom change nothing: they can wait.
        image = _resize(image, height, size)
        canvas = _paint(width, size, colour)
        top = (width - height) // 2
        canvas[:, :, top : top + height] = image
    else:
        canvas = _paint(height, height, colour)
        left = (height - width) // 2
        canvas[:, :, :, left : left + width] = image
    return _resize(canvas, size, size)


def mean_colour(mean: Sequence[float]) -> np.ndarray:
    """Return uint8[3], the mean colour of a tower, which is near 0 after normalisation."""
    # int(), not round(): the colour that LLaVA and VILA were trained with.
    return np.array([int(channel * 255) for channel in mean], dtype=np.uint8)


def _paint(height: int, width: int, colour: Tensor) -> Tensor:
    return colour.expand(1, height, width, 3).contiguous().permute(0, 3, 1, 2)


def _crop_centre(image: Tensor, size: int) -> Tensor:
    height, width = image.shape[-2:]
    if width <= height:
        scaled_height, scaled_width = int(size * height / width), size
    else:
        scaled_height, scaled_width = size, int(size * width / height)
    top, left = (scaled_height - size) // 2, (scaled_width - size) // 2
    # What F.interpolate calls; it takes a scale or a size, while with both the filter stops where the square ends.
    end, right = _end(top + size, scaled_height, height), _end(left + size, scaled_width, width)
    down, across = scaled_height / height, scaled_width / width
    if _shrinks_tall(image, scaled_height, scaled_width):
        image, down = _upsample(image, (end, width), False, down, None), 1.0
    resized = _upsample(image, (end, right), False, down, across)
    return resized[:, :, top : top + size, left : left + size]


def _end(end: int, scaled: int, original: int) -> int:
    # Along a side whose length stays as it is, the filter does nothing, whatever the scale.
    return scaled if end == original else end
