import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_vlm.config import ParallelConfig
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.parallel.groups import seed_everything
from tests.support.configs import tiny_model
from tests.support.vision_towers import UNPACKED, tiny_models

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


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


def towers(learns=True, **computation):
    """Yield settings, and tower, of every kind."""
    for model in tiny_models():
        freeze = () if learns else ("vision_model",)
        yield model.vision, build_model(model, ParallelConfig(), Computation(**computation), freeze)[0].vision_model


def test_every_tower_has_the_parameters_that_its_settings_count(one_rank):
    for vision, tower in towers():
        sizes = {name: parameter.numel() for name, parameter in tower.named_parameters()}
        assert sizes == vision.parameter_sizes, vision.type


def test_every_tower_does_the_operations_that_its_settings_count(one_rank):
    for vision, tower in towers():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            features = tower(torch.rand(2, 3, vision.image_size, vision.image_size))
        operations = vision.operations(vision.constant_grid).times(2)
        assert counter.get_total_flops() == operations.forward, vision.type
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            features.sum().backward()
        training = operations.training(learns=True, input_gradient=False)
        assert counter.get_total_flops() == training - operations.forward, vision.type


def test_a_frozen_tower_keeps_nothing(one_rank):
    for vision, tower in towers(learns=False):
        features = tower(torch.rand(2, 3, vision.image_size, vision.image_size))
        assert not features.requires_grad, vision.type


def test_recomputation_changes_no_gradient_of_any_tower(one_rank):
    found = []
    for recompute in ("none", "full"):
        seed_everything(3)
        gradients = []
        for vision, tower in towers(recompute=recompute):
            features = tower(torch.linspace(-1, 1, 3 * vision.image_size**2).view(1, 3, *2 * [vision.image_size]))
            features.square().sum().backward()
            gradients += [parameter.grad for parameter in tower.parameters()]
        found.append(gradients)
    for plain, again in zip(*found, strict=True):
        # The same bits, but for two biases under s2, whose sums are taken in another order.
        torch.testing.assert_close(again / plain.abs().max(), plain / plain.abs().max(), rtol=0, atol=1e-6)


LAYOUTS = {
    "unpacked": (1, {"rows": UNPACKED}),
    "tp2": (2, {"parallel": TP2, "training": {"recompute": "full"}}),
    "tp2_split": (2, {"parallel": {**TP2, "vision_tensor_parallel": True}}),
}


@pytest.mark.distributed
def test_every_tower_is_trained_alike_packed_or_not_and_by_two_ranks_that_share_images_or_tower(workers):
    job = "tests.support.vision_towers:train_every_tower"
    (expected,) = workers.run(job, 1)
    for name, (size, arguments) in LAYOUTS.items():
        for found in workers.run(job, size, **arguments):
            for (losses, norms), (other_losses, other_norms) in zip(expected, found, strict=True):
                # float32: sums in another order
                assert other_losses == pytest.approx(losses, rel=1e-5), name
                assert other_norms == pytest.approx(norms, rel=1e-5), name
