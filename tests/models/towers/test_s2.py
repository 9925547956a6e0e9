import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megatron_vlm.checkpoint.folder import find_checkpoint
from megatron_vlm.checkpoint.tensors import list_tensors
from megatron_vlm.config import ParallelConfig
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.towers.s2 import Config
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.towers.s2 import merge_tiles, split_into_tiles
from tests.support.configs import tiny_model, tiny_run
from tests.support.jobs import save_initial, train_steps

ROWS = [[0, 1], [2, 3], [4, 5], [6, 7]]


def model_of(*scales, **changes):
    """Return the tiny model with its tower, of 32 pixels, at these scales."""
    model = tiny_model()
    return dataclasses.replace(model, vision=Config(scales=scales, tower=dataclasses.replace(model.vision, **changes)))


def tower_of(*scales, **changes):
    (chunk,) = build_model(model_of(*scales, **changes), ParallelConfig(), Computation())
    return chunk.vision_model


def reference(f, images, sizes, tile):
    """Scaling on scales as its authors wrote it, for square grids: 20 lines of plain torch."""
    maps = []
    for size in sizes:
        n, b = size // tile, len(images)
        scaled = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False)
        rows = [row.chunk(n, dim=3) for row in scaled.chunk(n, dim=2)]
        features = [[f(x) for x in row] for row in rows]  # tile by tile
        side = round(features[0][0].size(1) ** 0.5)
        features = [[x.transpose(1, 2).reshape(b, -1, side, side) for x in row] for row in features]
        maps.append(torch.cat([torch.cat(row, dim=3) for row in features], dim=2))
    smallest = maps[0].shape[-2:]
    maps = [F.interpolate(x, size=smallest, mode="area") for x in maps]
    return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)


def test_tiles_are_row_by_row_and_outermost():
    values = torch.arange(4.0).view(2, 2).repeat_interleave(3, 0).repeat_interleave(3, 1)  # 2 x 2 tiles of 3 x 3
    images = torch.stack([values, values + 10])[:, None].expand(2, 3, 6, 6)
    tiles = split_into_tiles(images, 2)
    assert tiles.shape == (8, 3, 3, 3)
    assert all((tile == tile[0, 0, 0]).all() for tile in tiles)
    assert tiles[:, 0, 0, 0].tolist() == [0, 10, 1, 11, 2, 12, 3, 13]


def test_merging_undoes_splitting():
    images = torch.randn(2, 3, 6, 6)
    tiles = split_into_tiles(images, 2).flatten(2).transpose(1, 2)
    merged = merge_tiles(tiles, 2, Grid(3, 3), Grid(6, 6))
    assert torch.equal(merged.transpose(1, 2).view(2, 3, 6, 6), images)


def test_merged_features_are_averaged_by_area_in_float32():
    features = torch.randn(4, 36, 5, dtype=torch.bfloat16)
    merged = merge_tiles(features, 2, Grid(6, 6), Grid(4, 4))
    whole = merge_tiles(features, 2, Grid(6, 6), Grid(12, 12)).transpose(1, 2).view(1, 5, 12, 12)
    expected = F.interpolate(whole.float(), size=(4, 4), mode="area").bfloat16()
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged.transpose(1, 2).view(1, 5, 4, 4), expected)


def test_class_tokens_are_averaged_over_the_tiles_of_a_scale(one_rank):
    tower = tower_of(32, 64, drop_class_token=False)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = tower(pixels)
        of_tiles = tower.tower(split_into_tiles(pixels, 2))[:, 0].view(4, 2, 36).mean(dim=0)
        dropped = tower_of(32, 64)
        dropped.load_state_dict(tower.state_dict())
        # float32: sums in another order
        torch.testing.assert_close(features[:, 0, 36:], of_tiles, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features[:, 1:], dropped(pixels))
    assert tower.vision_config.constant_grid == Grid(4, 4, 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_one_scale_is_the_plain_tower(one_rank, dtype):
    tower = tower_of(32)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8).to(dtype)
    with torch.no_grad():
        assert torch.equal(tower(pixels), tower.tower(pixels))


@pytest.mark.parametrize("scales", [(32, 64), (32, 64, 96), (64, 128)])
def test_features_and_gradients_equal_those_of_the_reference(one_rank, scales):
    tower = tower_of(*scales)
    pixels = torch.randn(2, 3, scales[-1], scales[-1], requires_grad=True)
    results = []
    for run in (tower, lambda x: reference(tower.tower, x, scales, 32)):
        tower.zero_grad()
        pixels.grad = None
        features = run(pixels)
        (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in tower.named_parameters()}
        results.append((features.detach(), pixels.grad.clone(), gradients))
    side = scales[0] // 8
    assert results[0][0].shape == (2, side * side, 36 * len(scales))
    # float32: the tiles of all scales in one product, and the means in another order
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


def test_pixels_are_normalised_before_they_are_interpolated(one_rank):
    tower = tower_of(32, 64)
    # Black beside white: bicubic interpolation overshoots the range of uint8, and a later rounding would cut it.
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    pixels[..., 31:] = 255
    mean = torch.tensor(tower.vision_config.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(tower.vision_config.image_std).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = reference(tower.tower, (pixels / 255 - mean) / std, (32, 64), 32)
        torch.testing.assert_close(tower(pixels), expected, rtol=1e-4, atol=2e-5)


def test_a_checkpoint_has_the_tensors_of_one_with_the_plain_tower(one_rank, tmp_path):
    tensors = []
    for name, model in (("plain", tiny_model()), ("scaled", model_of(32, 64))):
        save_initial(tiny_run(str(tmp_path / name), model=model))
        found = list_tensors(find_checkpoint(tmp_path / name))
        tensors.append({key: value for key, value in found.items() if key.startswith("model.vision_model.")})
    assert tensors[0] == tensors[1] != {}


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(one_rank, tmp_path):
    config = tiny_run(str(tmp_path / "run"), model=model_of(32, 64))
    whole = train_steps(dataclasses.replace(config, run_dir="unused"), ROWS * 2, num_samples=8, num_steps=2)
    train_steps(config, ROWS * 2, num_samples=8, num_steps=1, save=True)
    resumed = train_steps(config, ROWS * 2, num_samples=8, num_steps=1)
    assert resumed.losses == whole.losses[1:]
    assert resumed.grad_norms == whole.grad_norms[1:]
