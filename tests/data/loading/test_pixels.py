"""Decoding follows the processors of CLIP and SigLIP, and every odd image is handled or refused as documented."""

import io
import time

import numpy as np
import PIL
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_vlm.config import DataError
from megatron_vlm.data.images.decoding import decode_rgb
from megatron_vlm.data.loading import pixels
from megatron_vlm.data.loading.pixels import decode_image

MEAN = (0.48145466, 0.4578275, 0.40821073)
PAD_COLOUR = (122, 116, 104)
# Around the borders at which Pillow changes the order of its passes, and sides that stay as they are.
_SHAPES = [
    *[(640, 480), (480, 640), (333, 517), (100, 77), (336, 336), (90, 400), (400, 90), (336, 700), (700, 336)],
    *[(400, 464), (400, 465), (400, 576), (400, 577), (335, 337), (300, 725), (384, 700), (350, 820)],
]


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with noise on top, so that resampling has work at all frequencies."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return Image.fromarray(np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8))


def decode(encoded: bytes, size: int = 16, aspect: str = "resize", **options) -> np.ndarray:
    return decode_image(encoded, image_size=size, aspect=aspect, mean=MEAN, **options)


def reference(encoded: bytes, size: int, aspect: str) -> np.ndarray:
    transformers = pytest.importorskip("transformers")
    side, no_colours = {"height": size, "width": size}, {"do_rescale": False, "do_normalize": False}
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    if aspect == "resize":
        processor = transformers.SiglipImageProcessor(size=side, **no_colours)
    else:
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=side, **no_colours)
    if aspect == "pad":
        side = max(image.size)
        canvas = Image.new("RGB", (side, side), PAD_COLOUR)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    return processor(image, return_tensors="np")["pixel_values"][0]


@pytest.mark.parametrize("aspect", ["pad", "square", "resize"])
@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("size", [224, 336, 384])
def test_decode_image_equals_the_processors_of_clip_and_siglip(aspect, shape, size):
    encoded = encode(make_photo(*shape), "JPEG", quality=90)
    difference = np.abs(reference(encoded, size, aspect).astype(int) - decode(encoded, size, aspect))
    # Before Pillow 13, some shapes went along the rows first.
    same_order = int(PIL.__version__.split(".")[0]) >= 13
    assert difference.mean() <= (0.01 if same_order else 0.3)
    assert difference.max() <= (2 if same_order else 4)


@pytest.mark.parametrize(("shape", "columns_first"), [((400, 464), False), ((400, 465), True), ((336, 900), False)])
def test_order_of_the_passes_is_that_of_pillow_13(shape, columns_first):
    width, height = shape
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, height, width), dtype=np.uint8))
    assert pixels._shrinks_tall(image, 336, 336) is columns_first


@pytest.mark.parametrize("aspect", ["pad", "square", "resize"])
@pytest.mark.parametrize("options", [{"quality": 85}, {"quality": 95, "subsampling": 0}, {"progressive": True}])
def test_jpeg_decoder_and_pillow_give_the_same(aspect, options, monkeypatch):
    encoded = encode(make_photo(120, 77), "JPEG", **options)
    fast = decode(encoded, 64, aspect)
    monkeypatch.setattr(pixels, "_decode_jpeg", lambda encoded, limits: None)
    assert (decode(encoded, 64, aspect) == fast).all()


@settings(max_examples=300, deadline=None)
@given(height=st.integers(2, 90), width=st.integers(2, 90), size=st.integers(1, 40))
@example(height=26, width=40, size=32)  # the square ends where the image does, at another scale
@example(height=32, width=46, size=32)  # the scale is 1
@example(height=90, width=40, size=20)  # along the columns first
def test_square_is_cut_from_the_whole_resized_image(height, width, size):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    image = image.permute(2, 0, 1)[None]
    short = min(height, width)
    scaled = [int(size * side / short) for side in (height, width)]
    whole = pixels._resize(image, *scaled)
    top, left = ((side - size) // 2 for side in scaled)
    assert torch.equal(pixels._crop_centre(image, size), whole[:, :, top : top + size, left : left + size])


def test_grey_jpeg_is_grey():
    result = decode(encode(make_photo(40, 30).convert("L"), "JPEG"))
    assert (result[0] == result[1]).all()
    assert (result[0] == result[2]).all()


def test_result_is_contiguous_uint8_with_channels_first():
    result = decode(encode(make_photo(40, 30)), 16)
    assert result.dtype == np.uint8
    assert result.shape == (3, 16, 16)
    assert result.flags.c_contiguous


def test_pad_keeps_the_whole_image_between_bars_of_the_mean_colour():
    result = decode(encode(Image.new("RGB", (40, 20), (10, 20, 30))), 40, "pad")
    assert (result[:, 0, :].T == PAD_COLOUR).all()
    assert (result[:, 20, :].T == (10, 20, 30)).all()


def test_16_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    result = decode(encode(Image.fromarray(ramp)), 16)
    assert np.abs(result[0].astype(int) - ramp / 257).max() <= 1


def test_cmyk_is_converted():
    result = decode(encode(Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(result.astype(int).mean((1, 2)) - (200, 40, 90)).max() < 6


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode):
    result = decode(encode(Image.new("RGBA", (16, 16), (0, 0, 0, 0)).convert(mode)))
    assert (result == 255).all()


def test_transparent_palette_is_laid_on_white():
    image = Image.new("P", (16, 16), 0)
    image.putpalette([0, 0, 0, 9, 9, 9])
    assert (decode(encode(image, transparency=0)) == 255).all()


def test_transparent_colour_of_an_rgb_png_is_laid_on_white():
    assert (decode(encode(Image.new("RGB", (16, 16), (0, 0, 0)), transparency=(0, 0, 0))) == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied_once(kind):
    # Orientation 6: the camera stored the picture turned left; the top left corner becomes the top right one.
    stored = Image.new("RGB", (32, 32), (0, 0, 0))
    stored.paste((255, 255, 255), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    result = decode(encode(stored, kind, exif=exif, quality=95), 32)
    assert result[:, 8, 24].min() > 240
    assert result[:, 8, 8].max() < 15


def test_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    result = decode(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert result[0].min() > 240
    assert result[1].max() < 10


@pytest.mark.parametrize(
    "encoded",
    [b"", b"<html>not found</html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>", encode(make_photo(8, 8), "BMP")],
)
def test_what_is_no_image_of_the_four_formats_is_refused(encoded):
    with pytest.raises(DataError, match="not a JPEG, PNG, WEBP or GIF"):
        decode(encoded)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_image_is_refused(kind):
    encoded = encode(make_photo(120, 90), kind)
    with pytest.raises(DataError, match="damaged|not a JPEG"):
        decode(encoded[: len(encoded) // 2])


@pytest.mark.parametrize(
    ("shape", "message"), [((400, 10), "at most 20"), ((1, 1), "at least 4"), ((10, 400), "at most 20")]
)
def test_an_image_outside_of_the_limits_is_refused(shape, message):
    encoded = encode(Image.new("RGB", shape))
    with pytest.raises(DataError, match=message):
        decode(encoded)


def test_huge_image_is_refused_from_its_header():
    encoded = encode(Image.new("1", (12000, 9000)))
    started = time.perf_counter()
    with pytest.raises(DataError, match="12000x9000 pixels, at most 50000000"):
        decode(encoded)
    assert time.perf_counter() - started < 0.1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_damaged_bytes_give_an_image_or_a_data_error(kind):
    encoded = bytearray(encode(make_photo(64, 48), kind))
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(encoded)
        for position in rng.integers(0, len(encoded), 3):
            damaged[position] = rng.integers(256)
        try:
            result = decode(bytes(damaged))
        except DataError:
            continue
        assert result.shape == (3, 16, 16)


def test_jpeg_turned_by_xmp_is_turned_as_pillow_does():
    photo = make_photo(40, 30)
    plain, turned = encode(photo, "JPEG"), encode(photo, "JPEG", xmp=b'<x tiff:Orientation="6"/>')
    assert (decode(turned, 32) != decode(plain, 32)).any()
    upright = decode_rgb(turned)
    assert upright.size == (30, 40)
    assert (decode(turned, 32) == decode(encode(upright, "PNG"), 32)).all()
