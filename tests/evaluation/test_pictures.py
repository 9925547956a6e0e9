from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.config import DataError
from megatron_vlm.evaluation.pictures import PictureReader, check_pictures
from tests.support.configs import tiny_model

VISION = tiny_model().vision
READER = PictureReader(VISION, "square")


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """A black and a white image file."""
    for name, grey in (("black.png", 0), ("white.png", 255)):
        Image.fromarray(np.full((40, 50, 3), grey, dtype=np.uint8)).save(tmp_path / name)
    return [tmp_path / "black.png", tmp_path / "white.png"]


def test_images_come_in_the_order_of_their_files(files):
    pixels = READER.read([files[1], files[0], files[1]])
    assert pixels.shape == (3, 3, VISION.image_size, VISION.image_size)
    assert [int(one.max()) for one in pixels] == [255, 0, 255]


def test_no_files_give_an_empty_batch():
    assert READER.read([]).shape == (0, 3, VISION.image_size, VISION.image_size)


def test_a_missing_file_is_named(files):
    with pytest.raises(DataError, match=r"image cannot be read: No such file or directory .*nowhere.png.; fix: check"):
        READER.read([files[0], Path("nowhere.png")])


def test_a_damaged_file_is_named(files):
    files[1].write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"white.png.; fix: replace the file"):
        READER.read(files)


def test_missing_files_are_counted_once_each(files):
    check_pictures(files * 2)
    with pytest.raises(DataError, match=r"2 of 4 images are missing, e.g. a.png, b.png; fix: name their folder"):
        check_pictures([*files, Path("a.png"), Path("b.png"), Path("a.png")])


def test_damaged_files_are_found_by_their_structure(files):
    check_pictures(files)
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[: len(whole) // 2])
    files[1].write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"2 of \d images cannot be read, e.g. .*image_truncated.*image_format"):
        check_pictures(files)
