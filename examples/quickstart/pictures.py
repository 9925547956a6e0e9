"""Other views of a training picture: the same shape mirrored and moved over the same background."""

import functools
import io
import random

import numpy as np
from PIL import Image


def draw_view(encoded: bytes, view: int, seed: str) -> bytes:
    """Return a view of a picture as PNG; view 0 is the picture itself, byte for byte.

    Every other view is mirrored by the toss of a coin and its shape moved to a random place. What the questions say
    (colour and shape, never left or right) stays true. A shape that the border cuts keeps the distance to it.

    Args:
        encoded: picture of one shape on a plain background.
        view: number of the view.
        seed: text that, with `view`, decides mirror and place.
    """
    if view == 0:
        return encoded
    draw = random.Random(f"{seed}/{view}")
    pixels, background = _decode(encoded)
    if draw.random() < 0.5:
        pixels = pixels[:, ::-1]
    drawn = (pixels != background).any(axis=2)
    moved = np.empty_like(pixels)
    moved[:] = background
    rows, row_shift = _place(drawn.any(axis=1), draw)
    columns, column_shift = _place(drawn.any(axis=0), draw)
    source = pixels[rows, columns]
    moved[
        rows.start + row_shift : rows.stop + row_shift, columns.start + column_shift : columns.stop + column_shift
    ] = source
    out = io.BytesIO()
    Image.fromarray(moved).save(out, format="PNG", compress_level=1)
    return out.getvalue()


@functools.lru_cache(maxsize=4096)
def _decode(encoded: bytes) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return uint8[height, width, 3] and the most frequent colour; kept, since a picture has several views."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    return np.asarray(image), max(image.getcolors(image.width * image.height), key=lambda found: found)[1]


def _place(occupied: np.ndarray, draw: random.Random) -> tuple[slice, int]:
    """Return the occupied range along one axis and how far it moves."""
    size = len(occupied)
    found = np.flatnonzero(occupied)
    start, stop = (int(found[0]), int(found[-1]) + 1) if found.size else (0, size)
    if start == 0 or stop == size:
        return slice(start, stop), 0
    return slice(start, stop), draw.randint(1, size - stop + start - 1) - start
