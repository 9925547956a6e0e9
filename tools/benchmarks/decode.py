"""Decoding to the tower's square, against the Hugging Face CLIP processor on Pillow.

    python tools/benchmarks/decode.py --json decode.json [PICTURE ...]

Without pictures, JPEG files of the sizes that web pictures have are made: smooth shapes with noise.
"""

import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import Result, cpu_seconds, parse_arguments, report
from transformers import CLIPImageProcessor

from megatron_vlm.data.pixels import decode_image

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_PAD_COLOUR = tuple(int(channel * 255) for channel in _MEAN)
_SHAPES = ((640, 480), (500, 375), (480, 640), (1024, 683), (400, 600), (800, 800))
_ROUNDS = 15


def make_jpeg(width: int, height: int, rng: np.random.Generator) -> bytes:
    """Return a JPEG file of about the size of a photo's."""
    coarse = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    noisy = Image.fromarray(np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8))
    stream = io.BytesIO()
    noisy.save(stream, "JPEG", quality=85)
    return stream.getvalue()


def open_picture(encoded: bytes, aspect: str) -> Image.Image:
    """Decode with Pillow and pad as LLaVA does."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    if aspect == "square" or image.width == image.height:
        return image
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), _PAD_COLOUR)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def measure(pictures: list[bytes], size: int, aspect: str, required: float) -> Result:
    """Compare one mode at one size."""
    options = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    processor = CLIPImageProcessor(**options)
    plain = CLIPImageProcessor(**options, do_rescale=False, do_normalize=False)

    def ours(encoded: bytes) -> np.ndarray:
        return decode_image(encoded, image_size=size, aspect=aspect, mean=_MEAN)

    seconds = cpu_seconds(
        _ROUNDS,
        ours=lambda: [ours(picture) for picture in pictures],
        peer=lambda: [processor(open_picture(picture, aspect), return_tensors="np") for picture in pictures],
    )
    gaps = [
        np.abs(plain(open_picture(picture, aspect), return_tensors="np")["pixel_values"][0].astype(int) - ours(picture))
        for picture in pictures
    ]
    mean_gap, max_gap = float(np.mean([gap.mean() for gap in gaps])), int(max(gap.max() for gap in gaps))
    ratio = seconds["peer"] / seconds["ours"]
    return Result(
        work=f"decode to {size} pixels, {aspect}",
        unit=f"ms a picture (difference: mean {mean_gap:.4f}, max {max_gap} of 255)",
        ours=seconds["ours"] / len(pictures) * 1e3,
        peers={"CLIP processor": seconds["peer"] / len(pictures) * 1e3},
        ratio=ratio,
        required=f">= {required}x, mean <= 0.01, max <= 2",
        met=ratio >= required and mean_gap <= 0.01 and max_gap <= 2,
    )


def main() -> int:
    """Run the benchmark."""

    def add(parser):
        parser.add_argument("pictures", nargs="*", type=Path, help="JPEG files; default: made ones")

    arguments = parse_arguments(__doc__, add)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    pictures = [path.read_bytes() for path in arguments.pictures] or [make_jpeg(*shape, rng) for shape in _SHAPES]
    results = [measure(pictures, size, "square", required) for size, required in ((224, 3.0), (336, 3.2))]
    return report(results, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
