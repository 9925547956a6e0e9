from tests.support.vision_towers import assert_equals_published


def test_tower_equals_hugging_face_clip(one_rank, tmp_path):
    for chosen in ({}, {"feature_layer": -1}, {"drop_class_token": False}):
        assert_equals_published("clip", tmp_path, **chosen)
