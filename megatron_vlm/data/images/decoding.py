"""Read image files: what they say about themselves, and their pixels at their own size.

Without torch, so that preparation starts fast; `pixels.py` makes of them what the vision tower is fed.
"""

import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from megatron_vlm.config import DataError

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_ORIENTATION_TAG = 0x0112
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
        check_limits(header, limits)
    return header


def decode_rgb(encoded: bytes, *, limits: ImageLimits | None = None) -> Image.Image:
    """Decode one image at its own size: upright, RGB, transparent parts on white, the first frame of an animation.

    Raises:
        DataError: the bytes are no JPEG, PNG, WEBP or GIF, are damaged, or are outside the limits.
    """
    image = _open(encoded)
    check_limits(ImageHeader(str(image.format), image.width, image.height), limits or ImageLimits())
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


def check_limits(header: ImageHeader, limits: ImageLimits) -> None:
    """Refuse an image by its header.

    Raises:
        DataError: it is outside the limits; names the limit.
    """
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


def is_upright(encoded: bytes) -> bool:
    """Whether the EXIF data of an image file, if any, leave it as it is stored.

    Raises:
        DataError: not one of the four formats by content.
    """
    try:
        return _open(encoded).getexif().get(_ORIENTATION_TAG, 1) == 1
    except _DECODE_ERRORS:
        return False


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
