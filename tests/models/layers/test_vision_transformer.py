import dataclasses

import pytest
import torch

from megatron_vlm.config import ParallelConfig
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.parallel.groups import seed_everything
from tests.support.configs import tiny_model


@pytest.fixture
def tower(one_rank):
    return build_model(tiny_model(), ParallelConfig(), Computation())[0].vision_model.eval()


def test_changing_the_last_patch_changes_every_patch_feature(tower):
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    other = pixels.clone()
    other[..., -8:, -8:] = 255 - other[..., -8:, -8:]
    with torch.no_grad():
        changed = (tower(pixels) - tower(other)).abs().amax(dim=-1)[0]
    assert changed.shape == (16,)
    assert changed.min() > 1e-6


def test_uint8_pixels_equal_pixels_normalised_by_hand(tower):
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor(tower.vision_config.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(tower.vision_config.image_std).view(1, 3, 1, 1)
    with torch.no_grad():
        # float32 rounding of (x - 255 m) / (255 s) against (x / 255 - m) / s
        torch.testing.assert_close(tower(pixels), tower((pixels / 255 - mean) / std), rtol=1e-4, atol=1e-5)


def test_normalisation_of_a_bf16_model_is_not_rounded(one_rank):
    tower = build_model(tiny_model(), ParallelConfig(), Computation(precision="bf16"))[0].vision_model
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    mean = torch.tensor(tower.vision_config.image_mean).view(1, 3, 1, 1) * 255
    std = torch.tensor(tower.vision_config.image_std).view(1, 3, 1, 1) * 255
    assert torch.equal(tower.bfloat16().normalise(pixels), ((pixels.float() - mean) / std).bfloat16())


def test_another_image_size_interpolates_the_positions(tower):
    pixels = torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8)
    with torch.no_grad():
        assert tower(pixels).shape == (1, 36, 36)


def test_patches_are_read_row_by_row(tower):
    pixels = torch.zeros(1, 3, 16, 32)
    pixels[..., 8:16, 16:24] = 1.0  # second row, third column of a 2 x 4 grid
    with torch.no_grad():
        patches = tower.conv1(pixels).flatten(2).transpose(1, 2)[0]
    assert patches.abs().amax(dim=-1).nonzero().flatten().tolist() == [1 * 4 + 2]


def test_images_of_a_batch_do_not_see_each_other(tower):
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        together = tower(pixels)
        # A batch of another size may sum in another order: float32.
        torch.testing.assert_close(together[1:2], tower(pixels[1:2]), rtol=1e-4, atol=1e-5)


def test_a_kept_class_token_stands_before_the_patches(one_rank):
    pixels, features = torch.rand(2, 3, 32, 32), []
    model = tiny_model()
    for drop in (True, False):
        seed_everything(3)
        vision = dataclasses.replace(model.vision, drop_class_token=drop)
        built = build_model(dataclasses.replace(model, vision=vision), ParallelConfig(), Computation())
        features.append(built[0].vision_model(pixels))
    assert features[1].shape == (2, 17, 36)
    assert torch.equal(features[0], features[1][:, 1:])
