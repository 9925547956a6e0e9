import pytest

from megatron_vlm.data.images.formats import FORMATS, find_format


@pytest.mark.parametrize("file_format", FORMATS, ids=lambda one: one.name)
def test_a_format_is_known_by_its_content(make_image, file_format):
    assert find_format(make_image(16, 16, file_format.name)) is file_format


@pytest.mark.parametrize("data", [b"", b"\xff", b"<html>", b"BM6\0", b"RIFF\0\0\0\0WAVE", b"GIF90a", b"\x89PNG\n"])
def test_other_files_have_none(data):
    assert find_format(data) is None
