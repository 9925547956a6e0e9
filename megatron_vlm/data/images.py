"""From an encoded image to the square of uint8 pixels that the vision tower is fed.

The result follows the Hugging Face CLIP processor (Pillow, bicubic), without its normalisation, which the device does.
"""

import io
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from megatron_vlm.config import DataError

Aspect = Literal["pad", "square", "resize"]

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_ORIENTATION_TAG = 0x0112
_BICUBIC = Image.Resampling.BICUBIC
# What Pillow raises on damaged bytes, over all four formats; anything else is a bug and must show itself.
_DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """Which images are taken, judged by the header alone."""

    max_pixels: int = 50_000_000
    """Largest width * height [pixels]."""
    min_side: int = 4
    """Smallest shorter side [pixels]."""
    max_aspect_ratio: float = 20.0
    """Largest longer side / shorter side."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image says about itself before it is decoded."""

    format: str
    """JPEG, PNG, WEBP or GIF."""
    width: int
    height: int


def read_image_header(encoded: bytes, limits: ImageLimits | None = None) -> ImageHeader:
    """Read format and size without decoding, and refuse what is outside `limits`.

    Raises:
        DataError: not one of the four formats by content, or outside the limits.
    """
    image = _open(encoded)
    header = ImageHeader("JPEG" if image.format == "MPO" else str(image.format), image.width, image.height)
    if limits is not None:
        _check_limits(header, limits)
    return header


def decode_image(
    encoded: bytes,
    *,
    image_size: int,
    aspect: Aspect,
    mean: Sequence[float],
    limits: ImageLimits | None = None,
) -> np.ndarray:
    """Decode one image and make it a square.

    Transparent images are laid on white, 16-bit ones scaled, EXIF orientation applied, and of an animation the first
    frame is taken.

    Args:
        encoded: JPEG, PNG, WEBP or GIF file; recognised by content.
        image_size: side of the result [pixels].
        aspect: pad with the mean colour; crop the centre (CLIP's own processing); resize without regard to the aspect.
        mean: mean colour of the tower, 0 to 1 per channel; used by "pad" only.
        limits: header limits; None: those of `ImageLimits`.

    Returns:
        uint8[3, image_size, image_size].

    Raises:
        DataError: the bytes are no such image, are damaged, or are outside the limits.

    Source: transformers CLIPImageProcessor for "square"; LLaVA-1.5, `expand2square` of llava/mm_utils.py for "pad".
    """
    rgb = decode_rgb(encoded, limits=limits)
    square = _SQUARERS[aspect](rgb, image_size, mean)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def decode_rgb(encoded: bytes, *, limits: ImageLimits | None = None) -> Image.Image:
    """Decode one image at its own size: upright, RGB, transparent parts on white, the first frame of an animation.

    Raises:
        DataError: as `decode_image`.
    """
    image = _open(encoded)
    _check_limits(ImageHeader(str(image.format), image.width, image.height), limits or ImageLimits())
    try:
        return _to_rgb(image)
    except _DECODE_ERRORS as error:
        raise DataError(
            f"{image.format} image of {len(encoded)} bytes is damaged: {error}", fix="leave the sample out"
        ) from None


def _open(encoded: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images; the limit on pixels decides instead.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(encoded), formats=_FORMATS)
    except _DECODE_ERRORS as error:
        raise DataError(
            f"{len(encoded)} bytes are not a JPEG, PNG, WEBP or GIF image ({type(error).__name__})",
            fix="leave the sample out",
        ) from None


def _check_limits(header: ImageHeader, limits: ImageLimits) -> None:
    short, long = sorted((header.width, header.height))
    size = f"image of {header.width}x{header.height} pixels"
    if header.width * header.height > limits.max_pixels:
        raise DataError(f"{size} has more than {limits.max_pixels}", fix="leave the sample out, or raise the limit")
    if short < limits.min_side:
        raise DataError(f"{size} has a side below {limits.min_side}", fix="leave the sample out, or lower the limit")
    if long > limits.max_aspect_ratio * short:
        raise DataError(
            f"{size} is longer than {limits.max_aspect_ratio:g} times its width or height",
            fix="leave the sample out, or raise the limit",
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    """Decode, turn upright and convert to RGB."""
    image.load()
    if image.getexif().get(_ORIENTATION_TAG, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # Pillow's own conversion of 16-bit grey clips at 255: nearly everything would become white.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _pad(image: Image.Image, size: int, mean: Sequence[float]) -> Image.Image:
    width, height = image.size
    if width == height:
        return _stretch(image, size, mean)
    side = max(width, height)
    # int(), not round(): the colour that LLaVA and VILA were trained with.
    canvas = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas.resize((size, size), _BICUBIC)


def _crop_centre(image: Image.Image, size: int, mean: Sequence[float]) -> Image.Image:
    width, height = image.size
    if width <= height:
        scaled_width, scaled_height = size, int(size * height / width)
    else:
        scaled_width, scaled_height = int(size * width / height), size
    left, top = (scaled_width - size) // 2, (scaled_height - size) // 2
    # Resize with a box would skip what is cropped away, but takes its two passes in another order: other rounding.
    scaled = (
        image if image.size == (scaled_width, scaled_height) else image.resize((scaled_width, scaled_height), _BICUBIC)
    )
    return scaled.crop((left, top, left + size, top + size))


def _stretch(image: Image.Image, size: int, mean: Sequence[float]) -> Image.Image:
    return image if image.size == (size, size) else image.resize((size, size), _BICUBIC)


_SQUARERS = {"pad": _pad, "square": _crop_centre, "resize": _stretch}
