"""Read image files: what they say about themselves, and their pixels at their own size.

Without torch, so that preparation starts fast; `pixels.py` makes of them what the vision tower is fed.
"""

import io
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from megatron_vlm.config import DataError
from megatron_vlm.config.prepare import ImageLimits

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_ORIENTATION_TAG = 0x0112
_LYING = frozenset([5, 6, 7, 8])
_JPEG_SCAN = b"\xda"
# What the segments, and the types and keywords of the chunks, begin with that Pillow reads an orientation from.
_JPEG_METADATA = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")
_PNG_METADATA = tuple(
    kind + keyword
    for kind, keyword in [(b"eXIf", b"")]
    + [(kind, b"Raw profile type exif\0") for kind in (b"tEXt", b"zTXt", b"iTXt")]
    + [(b"iTXt", b"XML:com.adobe.xmp\0")]
)
_WEBP_METADATA = 0x08 | 0x04  # flags of EXIF and of XMP
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
            # Pillow warns of large images, where the limit on pixels decides, and of corrupt EXIF data.
            warnings.simplefilter("ignore")
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


def has_orientation(encoded: bytes) -> bool:
    """Tell whether an image file has metadata that may say how it is to be turned, EXIF or XMP.

    Only segments and chunks are looked at: searching a whole file would take as long as resizing it.
    """
    if encoded.startswith(b"\xff\xd8"):
        return any(encoded.startswith(_JPEG_METADATA, start + 4) for start in _jpeg_segments(encoded))
    if encoded.startswith(b"\x89PNG"):
        return any(encoded.startswith(_PNG_METADATA, start + 4) for start in _png_chunks(encoded))
    if encoded.startswith(b"RIFF"):
        return encoded[12:16] == b"VP8X" and bool(encoded[20] & _WEBP_METADATA)
    return False


def _jpeg_segments(encoded: bytes) -> Iterator[int]:
    """Yield where each segment before the scan begins."""
    position = 2
    while encoded[position : position + 1] == b"\xff" and encoded[position + 1 : position + 2] != _JPEG_SCAN:
        if encoded[position + 1 : position + 2] == b"\xff":  # a fill byte
            position += 1
            continue
        yield position
        position += 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")


def _png_chunks(encoded: bytes) -> Iterator[int]:
    """Yield where each chunk begins."""
    position = 8
    while position < len(encoded):
        yield position
        position += 12 + int.from_bytes(encoded[position : position + 4], "big")


def is_upright(encoded: bytes) -> bool:
    """Tell whether an image is stored as it is to be seen.

    Raises:
        DataError: not one of the four formats by content.
    """
    return _orientation(encoded) == 1


def has_swapped_sides(encoded: bytes) -> bool:
    """Tell whether an image is stored lying on its side: upright, it is as wide as the file says that it is high.

    Raises:
        DataError: not one of the four formats by content.
    """
    return _orientation(encoded) in _LYING


def _orientation(encoded: bytes) -> int | None:
    """Return the orientation that the metadata name, 1 if none; None if they cannot be read."""
    image = _open(encoded)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of corrupt EXIF data
            return image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODE_ERRORS:
        return None


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
