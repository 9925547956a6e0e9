"""The format of an image file, from its first bytes; file names and HTTP headers are often wrong."""

from typing import Literal, NamedTuple


class ImageFormat(NamedTuple):
    """A format of image files."""

    name: Literal["JPEG", "PNG", "WEBP", "GIF"]
    """As Pillow spells it."""
    extension: str
    media_type: str


JPEG = ImageFormat("JPEG", "jpg", "image/jpeg")
PNG = ImageFormat("PNG", "png", "image/png")
WEBP = ImageFormat("WEBP", "webp", "image/webp")
GIF = ImageFormat("GIF", "gif", "image/gif")
FORMATS = (JPEG, PNG, WEBP, GIF)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def find_format(data: bytes) -> ImageFormat | None:
    """Return the format of an image file; None if it is not one of `FORMATS`."""
    if data.startswith(b"\xff\xd8"):
        return JPEG
    if data.startswith(PNG_SIGNATURE):
        return PNG
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WEBP
    return GIF if data.startswith((b"GIF87a", b"GIF89a")) else None
