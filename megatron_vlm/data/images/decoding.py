"""Read image files: orientation from their metadata, and pixels at their original size.

Without torch, so that preparation starts fast; `pixels.py` makes of them what the vision tower is fed.
"""

import io
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps

from megatron_vlm.config import DataError
from megatron_vlm.config.prepare import ImageLimits
from megatron_vlm.data.images.formats import FORMATS
from megatron_vlm.data.images.png import strip_png_texts

_FORMATS = tuple(one.name for one in FORMATS)
_ORIENTATION_TAG = 0x0112
LYING = frozenset([5, 6, 7, 8])
"""Orientations of images that lie on their side: width and height of the upright image are swapped."""
_JPEG_SCAN = b"\xda"
JPEG_METADATA = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")
"""Beginnings of the segments from which Pillow reads an orientation."""
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
        # Pillow also refuses texts behind the pixels.
        bare = strip_png_texts(encoded)
        if len(bare) < len(encoded):
            return decode_rgb(bare, limits=limits)
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
        bare = strip_png_texts(encoded)
        if len(bare) < len(encoded):
            return _open(bare)
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


def has_jpeg_metadata(encoded: bytes) -> bool:
    """Tell whether a JPEG has EXIF or XMP, which may contain an orientation.

    Only segments are examined; searching the whole file would take as long as resizing the image.
    """
    position = 2
    while encoded[position : position + 1] == b"\xff" and (kind := encoded[position + 1 : position + 2]) != _JPEG_SCAN:
        if kind == b"\xff":  # a fill byte
            position += 1
            continue
        if encoded.startswith(JPEG_METADATA, position + 4):
            return True
        position += 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")
    return False


def find_orientation(encoded: bytes) -> int:
    """Return the orientation in the metadata; 1, upright, if there is none or the metadata cannot be read.

    Raises:
        DataError: the content is not JPEG, PNG, WEBP or GIF.
    """
    return _orientation(_open(encoded))


def _orientation(image: Image.Image) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of corrupt EXIF data
            return image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODE_ERRORS:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Decode, turn upright and convert to RGB."""
    image.load()
    if _orientation(image) != 1:
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
