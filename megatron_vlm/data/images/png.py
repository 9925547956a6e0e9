"""The chunks of a PNG file."""

import struct
from collections.abc import Iterator

from megatron_vlm.data.images.formats import PNG_SIGNATURE

_CHUNK = struct.Struct(">I4s")
_CRC_BYTES = 4
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def read_chunks(encoded: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, start and end of each chunk up to IEND; start is that of its length, end that of its data.

    Raises:
        struct.error: the file ends within a chunk.
    """
    position = len(PNG_SIGNATURE)
    while True:
        length, kind = _CHUNK.unpack_from(encoded, position)
        end = position + _CHUNK.size + length
        yield kind, position, end
        if kind == b"IEND":
            return
        position = end + _CRC_BYTES


def strip_png_texts(encoded: bytes) -> bytes:
    """Return a PNG without its texts and colour profile, which do not affect the pixels; anything else unchanged.

    Pillow refuses an image with more than 1 MiB of them, although its pixels are whole; browsers show it.
    """
    if not encoded.startswith(PNG_SIGNATURE):
        return encoded
    try:
        chunks = list(read_chunks(encoded))
    except struct.error:
        return encoded
    kept = [encoded[start : end + _CRC_BYTES] for kind, start, end in chunks if kind not in _TEXTS]
    return PNG_SIGNATURE + b"".join(kept)
