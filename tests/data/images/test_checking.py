import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image as PILImage

from megatron_vlm.config.prepare import ImageLimits, ImageRules
from megatron_vlm.data.images.checking import ImageFacts, check_image, shrink_image
from megatron_vlm.data.rejects import RejectError

RULES = ImageRules()
FORMATS = ["JPEG", "PNG", "WEBP", "GIF"]


def reason_of(data: bytes, rules: ImageRules = RULES) -> str:
    with pytest.raises(RejectError) as caught:
        check_image(data, rules)
    return caught.value.reason


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_whole_image_is_taken_with_its_size(make_image, file_format):
    assert check_image(make_image(50, 40, file_format), RULES) == ImageFacts(50, 40)


@pytest.mark.parametrize(
    "options",
    [
        {"format": "JPEG", "progressive": True},
        {"format": "JPEG", "exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"},
        {"format": "JPEG", "restart_marker_blocks": 2},
        {"format": "WEBP", "lossless": True},
        {"format": "PNG", "bits": 4},
        {"format": "GIF", "interlace": 1},
    ],
)
def test_encoder_options_make_no_difference(options):
    stream = io.BytesIO()
    mode = "P" if options["format"] == "GIF" or "bits" in options else "RGB"
    PILImage.new(mode, (33, 21)).save(stream, **options)
    facts = check_image(stream.getvalue(), RULES)
    assert (facts.width, facts.height) == (33, 21)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_are_taken(make_image, mode):
    assert check_image(make_image(50, 40, mode=mode), RULES) == ImageFacts(50, 40)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.6, 0.9])
def test_a_truncated_image_is_rejected(make_image, file_format, fraction):
    data = make_image(64, 64, file_format)
    assert reason_of(data[: int(len(data) * fraction)]) == "image_truncated"


@pytest.mark.parametrize("file_format", FORMATS)
def test_no_prefix_of_an_image_raises_anything_else(make_image, file_format):
    data = make_image(20, 20, file_format)
    for length in range(len(data) - 2):
        with pytest.raises(RejectError):
            check_image(data[:length], RULES)


@pytest.mark.parametrize("file_format", FORMATS)
def test_random_damage_is_rejected_or_taken_but_never_another_error(make_image, file_format):
    generator = np.random.default_rng(0)
    data = make_image(20, 20, file_format)
    reasons = set()
    for _ in range(300):
        damaged = bytearray(data)
        for position in generator.integers(0, len(data), 3):
            damaged[position] = generator.integers(0, 256)
        try:
            check_image(bytes(damaged), RULES)
        except RejectError as error:
            reasons.add(error.reason)
    assert all(reason.startswith("image_") for reason in reasons)


def test_truncated_jpeg_with_a_whole_thumbnail_is_rejected(make_image):
    thumbnail, data = make_image(16, 16), make_image(64, 64)
    exif = b"Exif\0\0" + thumbnail
    with_thumbnail = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    assert check_image(with_thumbnail, RULES).width == 64
    assert reason_of(with_thumbnail[:-2]) == "image_truncated"


def test_bytes_after_the_end_of_an_image_are_allowed(make_image):
    for file_format in FORMATS:
        assert check_image(make_image(50, 40, file_format) + b"\0\0garbage", RULES) == ImageFacts(50, 40)


@pytest.mark.parametrize("data", [b"<!DOCTYPE html><html>", b"<svg xmlns='x'/>", b"BM" + bytes(60), b"%PDF-1.4", b"x"])
def test_other_formats_are_rejected_by_content(data):
    assert reason_of(data) == "image_format"


def test_bmp_and_tiff_are_rejected(make_image):
    for file_format in ("BMP", "TIFF", "PPM"):
        assert reason_of(make_image(file_format=file_format)) == "image_format"


def test_empty_file_is_rejected():
    assert reason_of(b"") == "image_empty"


@pytest.mark.parametrize(
    ("size", "reason"), [((1, 1), "image_side"), ((1, 10000), "image_side"), ((10, 1000), "image_aspect")]
)
def test_tiny_and_long_images_are_rejected(make_image, size, reason):
    assert reason_of(make_image(*size)) == reason


def test_side_that_shards_cannot_hold_is_rejected():
    rules = ImageRules(limits=ImageLimits(max_aspect_ratio=1e9))
    with pytest.raises(RejectError, match="65536x8 pixels, a side must have at most 65535"):
        check_image(bomb(65536, 8), rules)


@pytest.mark.parametrize("decode", [False, True])
def test_size_is_that_of_the_upright_image(decode):
    exif = PILImage.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    PILImage.new("RGB", (48, 40)).save(stream, "JPEG", exif=exif)
    data, rules = stream.getvalue(), ImageRules(decode=decode)
    facts = check_image(data, rules)
    assert (facts.width, facts.height) == (40, 48)
    small = shrink_image(data, facts, ImageRules(resize_shorter_side=20))
    assert small.size == (20, 24) == PILImage.open(io.BytesIO(small.data)).size


def test_corrupt_exif_data_are_not_warned_of(recwarn):
    stream = io.BytesIO()
    PILImage.new("RGB", (33, 21)).save(stream, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")
    check_image(stream.getvalue(), RULES)
    assert not recwarn.list


def test_limits_are_options(make_image):
    rules = ImageRules(limits=ImageLimits(min_side=1, max_aspect_ratio=1e9), min_bytes=1)
    assert check_image(make_image(1, 1000), rules).height == 1000
    assert reason_of(make_image(), ImageRules(min_bytes=10_000)) == "image_bytes"
    assert reason_of(make_image(), ImageRules(max_bytes=100)) == "image_bytes"


def bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def test_bombs_are_rejected_from_the_header_in_under_ten_milliseconds(make_image):
    jpeg = bytearray(make_image())
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60000, 60000)
    gif = bytearray(make_image(file_format="GIF"))
    gif[6:10] = struct.pack("<HH", 60000, 60000)
    start = time.perf_counter()
    for data in (bomb(50_000, 50_000), bytes(jpeg), bytes(gif)):
        assert reason_of(data) == "image_pixels"
    assert time.perf_counter() - start < 0.03


def test_flipped_bit_of_a_png_is_found(make_image):
    data = bytearray(make_image(file_format="PNG"))
    data[len(data) // 2] ^= 1
    assert reason_of(bytes(data)) == "image_damaged"


def test_twelve_bit_and_lossless_jpegs_are_rejected(make_image):
    for offset, value in ((4, 12), (1, 0xC3)):
        data = bytearray(make_image())
        data[data.index(b"\xff\xc0") + offset] = value
        assert reason_of(bytes(data)) == "image_format"


def test_damage_inside_is_found_by_decoding_on_request(make_image):
    data = bytearray(make_image(64, 64))
    frame = data.index(b"\xff\xc4")
    data[frame + 4 : frame + 24] = b"\xff" * 20
    check_image(bytes(data), RULES)
    assert reason_of(bytes(data), ImageRules(decode=True)) == "image_damaged"


def test_animation_is_seen(make_image):
    frames = [PILImage.new("RGB", (20, 20), (shade, 0, 0)) for shade in (0, 120, 240)]
    for file_format in ("GIF", "WEBP", "PNG"):
        stream = io.BytesIO()
        frames[0].save(stream, file_format, save_all=True, append_images=frames[1:])
        assert check_image(stream.getvalue(), RULES).animated


def test_checking_costs_little_beside_decoding(make_image):
    data = make_image(640, 480)
    start = time.perf_counter()
    for _ in range(100):
        check_image(data, RULES)
    assert (time.perf_counter() - start) / 100 < 0.000_5


def test_larger_images_are_encoded_again_with_the_shorter_side_wanted(make_image):
    data, rules = make_image(90, 60, "PNG"), ImageRules(resize_shorter_side=30)
    small = shrink_image(data, check_image(data, rules), rules)
    assert (check_image(small.data, rules), small.size) == (ImageFacts(45, 30), (45, 30))


def test_images_that_are_small_already_keep_their_bytes(make_image):
    data, rules = make_image(30, 60), ImageRules(resize_shorter_side=30)
    for own in (rules, RULES):
        image = shrink_image(data, check_image(data, own), own)
        assert image.data is data
        assert image.size == (30, 60)


def test_damage_found_while_shrinking_is_a_reject(make_image):
    data = bytearray(make_image(64, 64))
    frame = data.index(b"\xff\xc4")
    data[frame + 4 : frame + 24] = b"\xff" * 20
    rules = ImageRules(resize_shorter_side=30)
    with pytest.raises(RejectError, match="image_damaged"):
        shrink_image(bytes(data), check_image(bytes(data), rules), rules)
