import io

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from megatron_vlm.data.images.png import read_chunks, strip_png_texts


@pytest.fixture
def encoded():
    texts = PngInfo()
    texts.add_text("Comment", "text")
    texts.add_itxt("XML:com.adobe.xmp", "<x/>")
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 6), (1, 2, 3, 4)).save(buffer, "PNG", pnginfo=texts, icc_profile=b"profile")
    return buffer.getvalue()


def test_chunks_are_those_of_the_file(encoded):
    assert [kind for kind, _, _ in read_chunks(encoded)] == [b"IHDR", b"iCCP", b"tEXt", b"iTXt", b"IDAT", b"IEND"]


def test_texts_and_profile_are_taken_out_and_nothing_else(encoded):
    bare = strip_png_texts(encoded)
    assert [kind for kind, _, _ in read_chunks(bare)] == [b"IHDR", b"IDAT", b"IEND"]
    assert Image.open(io.BytesIO(bare)).getpixel((0, 0)) == (1, 2, 3, 4)
    assert strip_png_texts(bare) == bare


@pytest.mark.parametrize("data", [b"", b"\xff\xd8 a JPEG", b"\x89PNG\r\n\x1a\n cut"])
def test_anything_else_stays_as_it_is(data):
    assert strip_png_texts(data) == data
