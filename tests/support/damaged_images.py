"""Images as the web has them: what preparation must refuse, by which reason, and what it must take."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encode(width: int = 48, height: int = 40, file_format: str = "JPEG", *, mode: str = "RGB", **options) -> bytes:
    """Return a random picture as a file."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, file_format, **options)
    return stream.getvalue()


def oversized_png(width: int, height: int) -> bytes:
    """Return a small PNG whose header says that it is large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


def _sixteen_bit() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.arange(40 * 40, dtype=np.uint16).reshape(40, 40) * 40).save(stream, "PNG")
    return stream.getvalue()


def _animation() -> bytes:
    frames = [Image.new("RGB", (20, 20), (shade, 0, 0)) for shade in (0, 120, 240)]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    return stream.getvalue()


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(exif=exif)


REFUSED: dict[str, tuple[bytes, str]] = {
    "truncated JPEG": (encode()[:-100], "image_truncated"),
    "truncated PNG": (encode(file_format="PNG")[:-100], "image_truncated"),
    "0 bytes": (b"", "image_empty"),
    "HTML": (b"<!DOCTYPE html><html><body>404</body></html>", "image_format"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image_format"),
    "BMP": (encode(file_format="BMP"), "image_format"),
    "TIFF": (encode(file_format="TIFF"), "image_format"),
    "1x10000": (encode(1, 10_000, "PNG"), "image_side"),
    "20x10000": (encode(20, 10_000, "PNG"), "image_aspect"),
    "1x1": (encode(1, 1, "PNG"), "image_side"),
    "too many pixels": (oversized_png(50_000, 50_000), "image_pixels"),
}
"""By name: the file, and the reason of its reject."""

TAKEN: dict[str, bytes] = {
    "16-bit PNG": _sixteen_bit(),
    "CMYK JPEG": encode(mode="CMYK"),
    "palette PNG": encode(file_format="PNG", mode="P"),
    "LA PNG": encode(file_format="PNG", mode="LA"),
    "RGBA PNG": encode(file_format="PNG", mode="RGBA"),
    "EXIF orientation": _rotated(),
    "animated GIF": _animation(),
}
"""By name: the file."""
