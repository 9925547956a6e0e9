"""Read image files: orientation from their metadata, and pixels at their original size.

Without torch, so that preparation starts fast; `pixels.py` makes of them what the vision tower is fed.
"""

import io
import struct
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from megatron_vlm.config import DataError
from megatron_vlm.config.prepare import ImageLimits
from megatron_vlm.data.images.formats import FORMATS, JPEG, PNG, WEBP, find_format

_FORMATS = tuple(one.name for one in FORMATS)
_ORIENTATION_TAG = 0x0112
_LYING = frozenset([5, 6, 7, 8])
_JPEG_SCAN = b"\xda"
# Beginnings of the segments, and types and keywords of the chunks, from which Pillow reads an orientation.
JPEG_METADATA = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")
PNG_METADATA = tuple(
    kind + keyword
    for kind, keyword in [(b"eXIf", b"")]
    + [(kind, b"Raw profile type exif\0") for kind in (b"tEXt", b"zTXt", b"iTXt")]
    + [(b"iTXt", b"XML:com.adobe.xmp\0")]
)
WEBP_METADATA = 0x08 | 0x04  # flags of EXIF and of XMP
# Errors that Pillow raises for damaged bytes in any of the four formats; all others are bugs and must not be hidden.
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


def decode_rgb(encoded: bytes, *, limits: ImageLimits | None = None) -> Image.Image:
    """Decode an image at its original size: upright, RGB, transparency on white, first frame of an animation.

    Raises:
        DataError: the bytes are not a JPEG, PNG, WEBP or GIF, are damaged, or the image exceeds the limits.
    """
    image = _open(encoded)
    check_limits(image.width, image.height, limits or ImageLimits())
    try:
        return _to_rgb(image)
    except _DECODE_ERRORS as error:
        raise DataError(
            f"{image.format} image of {len(encoded)} bytes is damaged: {error}", fix="leave the sample out"
        ) from None


def _open(encoded: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns about large images, for which the limit on pixels decides, and about corrupt EXIF data.
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(encoded), formats=_FORMATS)
    except _DECODE_ERRORS as error:
        raise DataError(
            f"{len(encoded)} bytes are not a JPEG, PNG, WEBP or GIF image ({type(error).__name__})",
            fix="leave the sample out",
        ) from None


def find_excess(width: int, height: int, limits: ImageLimits) -> tuple[str, str] | None:
    """Return why an image exceeds the limits, as reason and detail of a reject; None if it does not."""
    size, short, long = f"{width}x{height} pixels", min(width, height), max(width, height)
    if width * height > limits.max_pixels:
        return "image_pixels", f"{size}, at most {limits.max_pixels} pixels are allowed"
    if short < limits.min_side:
        return "image_side", f"{size}, the shorter side must have at least {limits.min_side}"
    if long > limits.max_aspect_ratio * short:
        return "image_aspect", f"{size}, the aspect ratio must be at most {limits.max_aspect_ratio:g}"
    return None


def check_limits(width: int, height: int, limits: ImageLimits) -> None:
    """Refuse an image that exceeds the limits, given its size [pixels].

    Raises:
        DataError: it exceeds a limit; names the limit.
    """
    if excess := find_excess(width, height, limits):
        raise DataError(f"image of {excess[1]}", fix="leave the sample out, or change the limits")


def has_orientation(encoded: bytes) -> bool:
    """Tell whether an image file has metadata that may contain an orientation: EXIF or XMP.

    Only segments and chunks are examined; searching the whole file would take as long as resizing the image.
    """
    file_format = find_format(encoded)
    if file_format is JPEG:
        return any(encoded.startswith(JPEG_METADATA, start + 4) for start in _jpeg_segments(encoded))
    if file_format is PNG:
        return any(encoded.startswith(PNG_METADATA, start + 4) for start in _png_chunks(encoded))
    if file_format is WEBP:
        return encoded[12:16] == b"VP8X" and bool(encoded[20] & WEBP_METADATA)
    return False


def _jpeg_segments(encoded: bytes) -> Iterator[int]:
    """Yield the position of each segment before the scan."""
    position = 2
    while encoded[position : position + 1] == b"\xff" and encoded[position + 1 : position + 2] != _JPEG_SCAN:
        if encoded[position + 1 : position + 2] == b"\xff":  # a fill byte
            position += 1
            continue
        yield position
        position += 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")


def _png_chunks(encoded: bytes) -> Iterator[int]:
    """Yield the position of each chunk."""
    position = 8
    while position < len(encoded):
        yield position
        position += 12 + int.from_bytes(encoded[position : position + 4], "big")


def is_upright(encoded: bytes) -> bool:
    """Tell whether an image is stored upright.

    Raises:
        DataError: the content is not JPEG, PNG, WEBP or GIF.
    """
    return _orientation(encoded) == 1


def has_swapped_sides(encoded: bytes) -> bool:
    """Tell whether an image is stored lying on its side, so that width and height of the upright image are swapped.

    Raises:
        DataError: the content is not JPEG, PNG, WEBP or GIF.
    """
    return _orientation(encoded) in _LYING


def _orientation(encoded: bytes) -> int | None:
    """Return the orientation in the metadata, 1 if there is none; None if the metadata cannot be read."""
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
        # Pillow's conversion of 16-bit grey clips at 255, which would turn nearly everything white.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
