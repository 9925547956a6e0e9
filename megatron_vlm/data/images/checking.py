"""Check images during preparation by their structure, without decoding them, and shrink them if wanted.

Decoding every image would take ten times as long as the rest of the preparation. The structure reveals incomplete
downloads: a JPEG is complete if an end-of-image marker follows its scan (in entropy-coded data, 0xFF is always followed
by 0x00 or a restart marker, and embedded thumbnails come before the scan), a PNG if all chunk checksums match, a GIF if
its first frame ends, a WEBP if it is as long as its header says. An option decodes each image as well.
"""

import dataclasses
import io
import struct
import zlib
from dataclasses import dataclass

from megatron_vlm.config import DataError
from megatron_vlm.config.prepare import ImageLimits, ImageRules
from megatron_vlm.data.documents import Image
from megatron_vlm.data.images.decoding import JPEG_METADATA, LYING, decode_rgb, find_excess, find_orientation
from megatron_vlm.data.images.formats import find_format
from megatron_vlm.data.images.png import read_chunks
from megatron_vlm.data.rejects import RejectError

MAX_SIDE = 65535
"""Longest side of an image that shards can hold [pixels]."""

_JPEG_APP1 = 0xE1
_JPEG_STANDALONE = frozenset([0x01, *range(0xD0, 0xD8)])
_JPEG_FRAMES = frozenset([*range(0xC0, 0xD0)]) - {0xC4, 0xC8, 0xCC}
# Baseline, extended and progressive, with Huffman or arithmetic coding; the others are lossless or hierarchical.
_JPEG_DECODABLE = frozenset([0xC0, 0xC1, 0xC2, 0xC9, 0xCA])
_WEBP_ANIMATED, _WEBP_METADATA = 0x02, 0x08 | 0x04  # flags; those of EXIF and of XMP
# Types and keywords of the chunks from which Pillow reads an orientation.
_PNG_METADATA = (
    b"eXIf",
    *(kind + b"Raw profile type exif\0" for kind in (b"tEXt", b"zTXt", b"iTXt")),
    b"iTXtXML:com.adobe.xmp\0",
)


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the structure of an image file tells; width and height are those of the upright image [pixels]."""

    width: int
    height: int
    animated: bool = False
    has_metadata: bool = False
    """Whether there is EXIF or XMP, which may contain an orientation."""


def check_image(data: bytes, rules: ImageRules) -> ImageFacts:
    """Check format, completeness and size of an image.

    Raises:
        RejectError: image_empty, image_format, image_truncated, image_damaged, image_bytes, image_pixels, image_side
            or image_aspect.
    """
    if not data:
        raise RejectError("image_empty", "the image has 0 bytes")
    if not rules.min_bytes <= len(data) <= rules.max_bytes:
        raise RejectError("image_bytes", f"{len(data)} bytes, allowed are {rules.min_bytes} to {rules.max_bytes}")
    if (file_format := find_format(data)) is None:
        raise RejectError("image_format", f"not a JPEG, PNG, WEBP or GIF; starts with {data[:12]!r}")
    try:
        facts = _READERS[file_format.name](data, rules.limits)
    except (IndexError, struct.error):
        raise RejectError("image_truncated", f"the file ends within its structure, after {len(data)} bytes") from None
    if rules.decode:
        width, height = _decode(data, rules).size
        return dataclasses.replace(facts, width=width, height=height)
    if facts.has_metadata and find_orientation(data) in LYING:
        return dataclasses.replace(facts, width=facts.height, height=facts.width)
    return facts


def shrink_image(data: bytes, facts: ImageFacts, rules: ImageRules) -> Image:
    """Return the image, shrunk if the rules say so.

    Raises:
        RejectError: image_damaged.
    """
    side = rules.resize_shorter_side
    if side is None or min(facts.width, facts.height) <= side:
        return Image(data, (facts.width, facts.height))
    image = _decode(data, rules)
    scale = side / min(image.width, image.height)
    small = image.resize((max(side, round(image.width * scale)), max(side, round(image.height * scale))))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=rules.jpeg_quality)
    return Image(stream.getvalue(), small.size)


def _decode(data: bytes, rules: ImageRules):
    try:
        return decode_rgb(data, limits=rules.limits)
    except DataError as error:
        raise RejectError("image_damaged", error.what) from None


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if not width or not height:
        raise RejectError("image_damaged", f"{width}x{height} pixels")
    if excess := find_excess(width, height, limits):
        raise RejectError(*excess)
    if max(width, height) > MAX_SIDE:
        raise RejectError("image_side", f"{width}x{height} pixels, a side must have at most {MAX_SIDE}")


def _read_jpeg(data: bytes, limits: ImageLimits) -> ImageFacts:
    position, size, has_metadata = 2, None, False
    while True:
        if data[position] != 0xFF:
            raise RejectError("image_damaged", f"no JPEG marker at byte {position}")
        while data[position] == 0xFF:
            position += 1
        marker = data[position]
        position += 1
        if marker in _JPEG_STANDALONE:
            continue
        length = data[position] << 8 | data[position + 1]
        if length < 2:
            raise RejectError("image_damaged", f"JPEG segment of {length} bytes at byte {position}")
        if marker in _JPEG_FRAMES:
            precision, height, width, components = struct.unpack_from(">BHHB", data, position + 2)
            if marker not in _JPEG_DECODABLE or precision != 8 or components not in (1, 3, 4):
                raise RejectError("image_format", f"JPEG of kind 0x{marker:X}, {precision} bits, {components} channels")
            size = (width, height)
            _check_size(width, height, limits)
        elif marker == _JPEG_APP1:
            has_metadata |= data.startswith(JPEG_METADATA, position + 2)
        position += length
        if marker == 0xDA:
            break
    if size is None:
        raise RejectError("image_damaged", "JPEG scan without a frame")
    if data.rfind(b"\xff\xd9", position) < 0:
        raise RejectError("image_truncated", f"JPEG of {len(data)} bytes has no end-of-image marker")
    return ImageFacts(*size, has_metadata=has_metadata)


def _read_png(data: bytes, limits: ImageLimits) -> ImageFacts:
    view = memoryview(data)
    size, animated, has_data, has_metadata = None, False, False, False
    for kind, position, end in read_chunks(data):
        (crc,) = struct.unpack_from(">I", data, end)
        if zlib.crc32(view[position + 4 : end]) != crc:
            raise RejectError("image_damaged", f"PNG chunk {kind!r} at byte {position} has another checksum")
        if size is None:
            if kind != b"IHDR":
                raise RejectError("image_damaged", "PNG does not start with IHDR")
            width, height = struct.unpack_from(">II", data, position + 8)
            size = (width, height)
            _check_size(width, height, limits)
        animated |= kind == b"acTL"
        has_metadata |= data.startswith(_PNG_METADATA, position + 4)
        has_data |= kind == b"IDAT"
    if size is None or not has_data:
        raise RejectError("image_damaged", "PNG without image data")
    return ImageFacts(*size, animated, has_metadata)


def _read_webp(data: bytes, limits: ImageLimits) -> ImageFacts:
    (length,) = struct.unpack_from("<I", data, 4)
    if len(data) < length + 8:
        raise RejectError("image_truncated", f"WEBP of {length + 8} bytes has only {len(data)}")
    kind, animated, has_metadata = data[12:16], False, False
    if kind == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            raise RejectError("image_damaged", "WEBP key frame without its start code")
        width, height = (value & 0x3FFF for value in struct.unpack_from("<HH", data, 26))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":
        animated, has_metadata = bool(data[20] & _WEBP_ANIMATED), bool(data[20] & _WEBP_METADATA)
        width, height = (int.from_bytes(data[start : start + 3], "little") + 1 for start in (24, 27))
    else:
        raise RejectError("image_damaged", f"WEBP starts with chunk {kind!r}")
    _check_size(width, height, limits)
    return ImageFacts(width, height, animated, has_metadata)


def _read_gif(data: bytes, limits: ImageLimits) -> ImageFacts:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    _check_size(width, height, limits)
    position = 13 + _gif_table_bytes(flags)
    frames = 0
    while frames < 2 and position < len(data):
        kind = data[position]
        if kind == 0x21:
            position = _skip_gif_blocks(data, position + 2)
        elif kind == 0x2C:
            if frames:
                return ImageFacts(width, height, animated=True)
            left, top, frame_width, frame_height, flags = struct.unpack_from("<HHHHB", data, position + 1)
            width, height = max(width, left + frame_width), max(height, top + frame_height)
            _check_size(width, height, limits)
            position = _skip_gif_blocks(data, position + 11 + _gif_table_bytes(flags))
            frames += 1
        else:
            break
    if not frames:
        raise RejectError("image_truncated" if position >= len(data) else "image_damaged", "GIF without a frame")
    return ImageFacts(width, height)


def _gif_table_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _skip_gif_blocks(data: bytes, position: int) -> int:
    while length := data[position]:
        position += 1 + length
    return position + 1


_READERS = {"JPEG": _read_jpeg, "PNG": _read_png, "WEBP": _read_webp, "GIF": _read_gif}
