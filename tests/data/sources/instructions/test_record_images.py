import base64

import pytest

from megatron_vlm.config.prepare import ImageRules
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import FolderImages, ImageReader
from megatron_vlm.data.sources.instructions.record_images import ImageRef, decode_base64, find_images

PICTURE = b"\xff\xd8 some bytes"
BASE64 = base64.b64encode(PICTURE).decode()
HELD = ImageRef(data=PICTURE)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({}, []),
        ({"image": None}, []),
        ({"image": []}, []),
        ({"image": ""}, []),
        ({"image": {"bytes": None, "path": None}}, []),
        ({"image": {"bytes": b"", "path": ""}, "images": ["", None, "a.jpg"]}, [ImageRef("a.jpg")]),
        ({"image": "sam/images/sa_1.jpg"}, [ImageRef("sam/images/sa_1.jpg")]),
        ({"image": ["a.jpg", "b.jpg"]}, [ImageRef("a.jpg"), ImageRef("b.jpg")]),
        ({"images": ["a.jpg"]}, [ImageRef("a.jpg")]),
        ({"image": [], "images": ["a.jpg"]}, [ImageRef("a.jpg")]),
        ({"image": "http://x/a.jpg"}, [ImageRef("http://x/a.jpg", "http://x/a.jpg")]),
        ({"image": f"data:image/jpeg;base64,{BASE64}"}, [HELD]),
        ({"image": {"bytes": PICTURE, "path": "a.jpg"}}, [HELD]),
        ({"image": {"bytes": BASE64}}, [HELD]),
        ({"image": {"bytes": None, "path": "a.jpg"}}, [ImageRef("a.jpg")]),
        ({"images": [{"bytes": PICTURE}, "a.jpg"]}, [HELD, ImageRef("a.jpg")]),
        ({"image_base64_str": [BASE64, BASE64]}, [HELD, HELD]),
        ({"image_base64_str": BASE64}, [HELD]),
        ({"image_base64_str": [""]}, []),
        ({"image_base64": [f"data:image/png;base64,{BASE64}"]}, [HELD]),
        ({"image_str": BASE64[:8] + "\n" + BASE64[8:]}, [HELD]),
    ],
)
def test_images_are_found_in_every_form(record, expected):
    assert find_images(record) == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"image": 7}, "json_type"),
        ({"image": [7]}, "json_type"),
        ({"image": {"x": 1}}, "json_type"),
        ({"image": "data:image/png;base64,***"}, "image_base64"),
        ({"image_base64_str": ["***"]}, "image_base64"),
        ({"image_base64_str": [BASE64[:-1]]}, "image_base64"),
        ({"image_base64_str": 5}, "json_type"),
        ({"image_base64_str": ["é"]}, "image_base64"),
    ],
)
def test_anything_else_is_rejected(record, reason):
    with pytest.raises(RejectError, match=reason):
        find_images(record)


def test_base64_names_its_field():
    with pytest.raises(RejectError, match="3 characters of image_base64_str are not base64"):
        decode_base64("a*b", "image_base64_str")


def test_an_image_is_loaded_from_the_record_or_the_folder_and_checked(tmp_path, make_image):
    images = ImageReader(FolderImages(tmp_path, max_bytes=10**6), ImageRules())
    (tmp_path / "a.jpg").write_bytes(make_image(seed=1))
    assert ImageRef("a.jpg").load(images) == (make_image(seed=1), (48, 40))
    assert ImageRef(data=make_image(seed=2)).load(images) == (make_image(seed=2), (48, 40))
    for ref in (ImageRef(data=b"no picture"), ImageRef("none.jpg")):
        with pytest.raises(RejectError, match="image_"):
            ref.load(images)
