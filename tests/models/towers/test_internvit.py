import pytest

from tests.support.vision_towers import assert_equals_published


@pytest.mark.parametrize("name", ["internvit_6b", "internvit_300m"])
def test_tower_equals_hugging_face_internvl(name, one_rank, tmp_path):
    for chosen in ({}, {"feature_layer": -2}, {"drop_class_token": False}):
        assert_equals_published(name, tmp_path, **chosen)
