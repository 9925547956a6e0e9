"""Encoded samples of random tokens and pictures, the same in every process."""

import io
from dataclasses import replace

import numpy as np
from PIL import Image

from megatron_vlm.data.loading.collate import PlacedSample
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment
from tests.support.configs import VOCAB_SIZE


def make_samples(num_samples: int, *, max_images: int = 3, seed: int = 11) -> list[PlacedSample]:
    """Return samples of 0 to `max_images` pictures at any place, some text without a loss, from two datasets."""
    rng = np.random.default_rng(seed)
    return [
        PlacedSample(_sample(rng, int(rng.integers(0, max_images + 1))), index, index % 2, f"sample {index}")
        for index in range(num_samples)
    ]


def pictures_then_text() -> list[PlacedSample]:
    """Return 8 samples with pictures, of which number 3 has one only, then 8 without."""
    counted = [(_num_pictures(placed.sample), placed) for placed in make_samples(64)]
    pictures = [(count, placed) for count, placed in counted if count][:8]
    text = [placed for count, placed in counted if not count][:8]
    one = next(place for place, (count, _) in enumerate(pictures) if count == 1)
    pictures.insert(3, pictures.pop(one))
    chosen = [placed for _, placed in pictures] + text
    return [replace(placed, sample_id=index) for index, placed in enumerate(chosen)]


def _num_pictures(sample: EncodedSample) -> int:
    return sum(isinstance(segment, ImageSegment) for segment in sample.segments)


def _sample(rng: np.random.Generator, num_images: int) -> EncodedSample:
    segments: list[TextSegment | ImageSegment] = [TextSegment(_tokens(rng, 1), True)]
    for _ in range(num_images):
        if rng.random() < 0.6:
            segments.append(TextSegment(_tokens(rng, int(rng.integers(1, 7))), bool(rng.random() < 0.7)))
        segments.append(ImageSegment(random_picture(rng), (32, 32)))
    segments.append(TextSegment(_tokens(rng, int(rng.integers(5, 13))), True))
    return EncodedSample(tuple(segments))


def _tokens(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(3, VOCAB_SIZE, count).astype(np.int32)


def random_picture(rng: np.random.Generator) -> bytes:
    """Return a PNG of 32 x 32 pixels."""
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def sample_length(sample: EncodedSample, num_image_tokens: int) -> int:
    """Return the positions that a sample takes."""
    return sum(num_image_tokens if isinstance(s, ImageSegment) else len(s.input_ids) for s in sample.segments)


def pack_in_order(lengths: list[int], seq_length: int) -> list[list[int]]:
    """Return rows of sample indices, filled one after the other."""
    rows: list[list[int]] = [[]]
    used = 0
    for index, length in enumerate(lengths):
        if used + length > seq_length:
            rows.append([])
            used = 0
        rows[-1].append(index)
        used += length
    return rows
