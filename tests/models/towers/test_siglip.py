import torch

from megatron_vlm.config import ParallelConfig
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from tests.support.configs import tiny_model_with_tower
from tests.support.vision_towers import assert_equals_published


def test_tower_equals_hugging_face_siglip(one_rank, tmp_path):
    for feature_layer in (-1, -2):
        assert_equals_published("siglip", tmp_path, feature_layer=feature_layer)


def test_pixels_beyond_the_last_whole_patch_are_not_read(one_rank):
    model = tiny_model_with_tower("siglip", image_size=30)
    tower = build_model(model, ParallelConfig(), Computation())[0].vision_model
    pixels = torch.rand(1, 3, 30, 30)
    features = tower(pixels)
    assert features.shape == (1, 9, 36)
    assert torch.equal(features, tower(pixels[..., :24, :24]))
