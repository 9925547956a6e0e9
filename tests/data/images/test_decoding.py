"""Image files are known by content, and refused by their header where they are outside the limits."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from megatron_vlm.config import DataError
from megatron_vlm.config.prepare import ImageLimits, ImageRules
from megatron_vlm.data.images.checking import check_image
from megatron_vlm.data.images.decoding import (
    LYING,
    check_limits,
    decode_rgb,
    find_orientation,
    has_jpeg_metadata,
)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_photo(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("encoded", [b"", b"<html>", encode(make_photo(8, 8), "BMP")])
def test_something_else_is_refused(encoded):
    with pytest.raises(DataError, match="not a JPEG, PNG, WEBP or GIF"):
        decode_rgb(encoded)


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [(8000, 8000, "at most 50000000"), (3, 9, "at least 4"), (9, 400, "at most 20")],
)
def test_limits_name_what_is_wrong(width, height, message):
    with pytest.raises(DataError, match=f"image of {width}x{height} pixels, .*{message}"):
        check_limits(width, height, ImageLimits())


def test_decode_rgb_keeps_the_size():
    image = decode_rgb(encode(make_photo(40, 30)))
    assert (image.mode, image.size) == ("RGB", (40, 30))


def test_decode_rgb_refuses_a_damaged_image():
    encoded = encode(make_photo(40, 30))
    with pytest.raises(DataError, match=f"PNG image of {len(encoded) // 2} bytes is damaged"):
        decode_rgb(encoded[: len(encoded) // 2])


@pytest.mark.parametrize(("orientation", "expected"), [(None, 1), (1, 1), (6, 6)])
def test_orientation_is_read_from_exif(orientation, expected):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    assert find_orientation(encode(make_photo(40, 30), "JPEG", exif=exif)) == expected


def turned(kind: str, orientation: int, metadata: str) -> bytes:
    """Encode a picture of 40x30 whose metadata say how it is to be turned."""
    photo = make_photo(40, 30)
    if metadata == "xmp":
        text = f'<x:xmpmeta tiff:Orientation="{orientation}"/>'
        if kind == "PNG":
            chunks = PngInfo()
            chunks.add_itxt("XML:com.adobe.xmp", text)
            return encode(photo, kind, pnginfo=chunks)
        return encode(photo, kind, xmp=text.encode())
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(photo, kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("metadata", ["exif", "xmp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_swapped_sides_are_those_of_the_decoded_image(kind, metadata, orientation):
    encoded = turned(kind, orientation, metadata)
    assert has_jpeg_metadata(encoded) or kind != "JPEG"
    assert (find_orientation(encoded) in LYING) == (decode_rgb(encoded).size == (30, 40)) == (orientation > 4)


def test_jpeg_without_metadata_has_none():
    assert not has_jpeg_metadata(encode(make_photo(40, 30), "JPEG"))


def test_fill_bytes_before_a_segment_hide_no_orientation():
    encoded = turned("JPEG", 6, "exif")
    assert has_jpeg_metadata(encoded[:2] + b"\xff\xff" + encoded[2:])


def png_with(*texts: tuple[bytes, bytes], behind: bool = False) -> bytes:
    """Encode a picture with further chunks before or behind its pixels."""
    encoded = encode(make_photo(40, 30))
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in texts
    )
    place = encoded.index(b"IEND" if behind else b"IDAT") - 4
    return encoded[:place] + chunks + encoded[place:]


LARGE = zlib.compress(bytes(2 << 20))


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"Comment\0\0" + LARGE),
        (b"iTXt", b"Comment\0\1\0\0\0" + LARGE),
        (b"iCCP", b"profile\0\0" + LARGE),
        (b"eXIf", b"no TIFF"),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 4\nzz")),
    ],
)
def test_pixels_of_a_png_are_read_whatever_its_metadata(chunk, behind):
    encoded = png_with(chunk, behind=behind)
    assert check_image(encoded, ImageRules()).width == 40
    assert decode_rgb(encoded).tobytes() == make_photo(40, 30).tobytes()


def test_orientation_survives_a_text_that_is_too_large():
    encoded = turned("PNG", 6, "exif")
    place = encoded.index(b"IDAT") - 4
    large = png_with((b"zTXt", b"Comment\0\0" + LARGE))
    begin = large.index(b"zTXt") - 4
    text = large[begin : begin + 12 + int.from_bytes(large[begin : begin + 4], "big")]
    assert decode_rgb(encoded[:place] + text + encoded[place:]).size == (30, 40)


def test_pixels_of_a_webp_are_read_whatever_its_exif():
    encoded = encode(make_photo(40, 30), "WEBP", exif=b"Exif\0\0no TIFF", lossless=True)
    assert find_orientation(encoded) == 1
    assert decode_rgb(encoded).tobytes() == make_photo(40, 30).tobytes()


def test_a_damaged_png_with_texts_is_still_damaged():
    encoded = bytearray(png_with((b"tEXt", b"Comment\0text")))
    place = encoded.index(b"IDAT") + 10
    encoded[place : place + 4] = b"\0\0\0\0"
    with pytest.raises(DataError, match="damaged"):
        decode_rgb(bytes(encoded))
