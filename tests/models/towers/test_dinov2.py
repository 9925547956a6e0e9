import pytest

from tests.support.vision_towers import assert_equals_published


@pytest.mark.parametrize("name", ["dinov2", "dinov2_giant", "dinov2_with_registers"])
def test_tower_equals_hugging_face_dinov2(name, one_rank, tmp_path):
    for image_size in (32, 56, 72):  # fewer, as many and more patches than positions
        assert_equals_published(name, tmp_path, image_size=image_size, post_norm=False)
    # last_hidden_state
    assert_equals_published(name, tmp_path, image_size=32, after=lambda model: model.layernorm)
    assert_equals_published(name, tmp_path, image_size=32, post_norm=False, feature_layer=-2)
    assert_equals_published(name, tmp_path, image_size=32, post_norm=False, drop_class_token=False)
