"""Decoding pictures to the square input of the tower, in pictures per CPU second of one process.

    python tools/benchmarks/decode.py --json decode.json [PICTURE ...]

Peers: the Hugging Face CLIP processor on Pillow, and the fastest published method, simplejpeg with torch's antialiased
bicubic filter. Both normalise; ours hands over uint8 and leaves that to the device. Differences are measured from the
CLIP processor's pixels before normalisation, in levels of 255. Without arguments, JPEG files are generated (smooth
shapes with noise): half in typical sizes of web pictures, half as the paper's tooling stores them (shorter side 336,
quality 75). A note gives the ratio for each half; decoding weighs more in large pictures, and all three decode alike.
"""

import io
import sys
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from corpora import STORED_SHAPES, make_jpeg
from PIL import Image
from report import Row, cpu_seconds, describe_versions, how_to_install, is_installed, parse_arguments, report

from megatron_vlm.data.loading.pixels import decode_image

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_WEB_SHAPES = ((640, 480), (500, 375), (480, 640), (1024, 683), (400, 600), (800, 800))
_SETS = {"web sizes": (_WEB_SHAPES, 85), "shorter side 336": (STORED_SHAPES, 75)}
_CLIP, _TORCH = "CLIP processor on Pillow", "simplejpeg + torch bicubic"
_MAX_MEAN_DIFFERENCE, _MAX_DIFFERENCE = 0.01, 2


class ClipProcessor:
    """The Hugging Face processor, starting from a JPEG file."""

    def __init__(self, size: int) -> None:
        from transformers import CLIPImageProcessor

        options = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
        self._normalising = CLIPImageProcessor(**options)
        self._plain = CLIPImageProcessor(**options, do_rescale=False, do_normalize=False)

    def normalised(self, encoded: bytes) -> np.ndarray:
        """Return the input of a model, float32[3, size, size]."""
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        return self._normalising(image, return_tensors="np")["pixel_values"][0]

    def pixels(self, encoded: bytes) -> np.ndarray:
        """Return the same without normalisation, 0 to 255."""
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        return self._plain(image, return_tensors="np")["pixel_values"][0].astype(int)


def decode_with_torch(encoded: bytes, size: int, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Return the input of a model, float32[3, size, size], with simplejpeg and torch."""
    image = torch.from_numpy(simplejpeg.decode_jpeg(encoded, "RGB")).permute(2, 0, 1)[None]
    scale = size / min(image.shape[-2:])
    height, width = (int(side * scale) for side in image.shape[-2:])
    image = torch.nn.functional.interpolate(image, (height, width), mode="bicubic", antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    return (image[0, :, top : top + size, left : left + size] / 255 - mean) / std


def measure(pictures: list[bytes], size: int, required: float, rounds: int) -> list[Row]:
    """Compare all methods at one size."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))

    def ours(encoded: bytes) -> np.ndarray:
        return decode_image(encoded, image_size=size, aspect="square", mean=_MEAN)

    work = {
        "ours": lambda: [ours(picture) for picture in pictures],
        _TORCH: lambda: [decode_with_torch(picture, size, mean, std) for picture in pictures],
    }
    processor = ClipProcessor(size) if is_installed("transformers") else None
    if processor is not None:
        work[_CLIP] = lambda: [processor.normalised(picture) for picture in pictures]
    speeds = {name: len(pictures) / seconds for name, seconds in cpu_seconds(rounds, work).items()}
    name = f"decode for CLIP at {size}"
    rows = [
        Row(
            work=name,
            unit="pictures per CPU second",
            ours=speeds["ours"],
            peers={peer: speeds[peer]} if peer in speeds else {},
            required=least,
        )
        for peer, least in ((_CLIP, required), (_TORCH, 1.0))
    ]
    if processor is None:
        return rows
    gaps = [np.abs(processor.pixels(picture) - ours(picture)) for picture in pictures]
    mean_gap, max_gap = float(np.mean([gap.mean() for gap in gaps])), int(max(gap.max() for gap in gaps))
    for kind, gap, most in (("mean", mean_gap, _MAX_MEAN_DIFFERENCE), ("largest", max_gap, _MAX_DIFFERENCE)):
        rows.append(
            Row(work=f"{name}, {kind} difference", unit="levels of 255", ours=gap, required=most, judged="at most")
        )
    return rows


def make_pictures() -> dict[str, list[bytes]]:
    """Return JPEG files by set, equally many in each."""
    rng = np.random.default_rng(0)
    number = len(_WEB_SHAPES)
    return {
        name: [make_jpeg(*shapes[i % len(shapes)], rng, quality=quality) for i in range(number)]
        for name, (shapes, quality) in _SETS.items()
    }


def main() -> int:
    """Run the benchmark."""

    def add(parser):
        parser.add_argument("pictures", nargs="*", type=Path, help="JPEG files (default: generated ones)")
        parser.add_argument(
            "--rounds", type=int, default=21, help="rounds in which all take turns (default: %(default)s)"
        )

    arguments = parse_arguments(__doc__, add)
    torch.set_num_threads(1)
    made = {} if arguments.pictures else make_pictures()
    pictures = [path.read_bytes() for path in arguments.pictures] or [
        one for several in made.values() for one in several
    ]
    rows, notes = [], []
    for size, required in ((224, 3.0), (336, 3.2)):
        rows += measure(pictures, size, required, arguments.rounds)
        for name, own in made.items() if is_installed("transformers") else ():
            ratio = measure(own, size, required, arguments.rounds)[0].ratio
            notes.append(f"only {name} at {size}: {ratio:.2f}x {_CLIP}")
    if not is_installed("transformers"):
        notes.append(how_to_install("transformers"))
    notes.append(describe_versions("transformers", "pillow", "simplejpeg", "torch", "numpy"))
    return report(rows, arguments.json, notes)


if __name__ == "__main__":
    sys.exit(main())
