import dataclasses

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from megatron_vlm.config import ParallelConfig
from megatron_vlm.convert.families import radio
from megatron_vlm.convert.folder import HFFolder
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.towers.radio import CroppedPositionEmbeddings
from tests.support.configs import tiny_model
from tests.support.radio import PATCH, SETTINGS, radio_in_plain_torch, radio_tensors, save_radio
from tests.support.vision_towers import our_tensors, settings_of

# Values reach 10; the order of sums differs.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def tower_of(folder, **chosen):
    """Return our tower with the weights of a folder."""
    vision = settings_of(folder, **chosen)
    (chunk,) = build_model(dataclasses.replace(tiny_model(), vision=vision), ParallelConfig(), Computation())
    tower = chunk.vision_model.eval()
    tower.load_state_dict(our_tensors(folder, vision, HFFolder(folder).read))
    return tower


# The table has 6 x 6 patches: the same, fewer, and wide and high ones.
@pytest.mark.parametrize("size", [(48, 48), (32, 32), (16, 40), (40, 24)])
def test_summary_features_and_gradients_equal_those_of_plain_torch(one_rank, tmp_path, size):
    tensors = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in radio_tensors().items()}
    folder = save_radio(tmp_path, {name: tensor.detach() for name, tensor in tensors.items()})
    tower, pixels = tower_of(folder), torch.randn(2, 3, *size)
    expected = radio_in_plain_torch(tensors, pixels)
    summary, features = tower.summarise(pixels)
    assert expected.std() > 0.3
    torch.testing.assert_close(summary, expected[:, [0, 2]].flatten(1), **FLOAT32)
    torch.testing.assert_close(features, expected[:, 5:], **FLOAT32)
    assert torch.equal(tower(pixels), features)
    direction = torch.randn_like(features)
    (features * direction).sum().backward()
    (expected[:, 5:] * direction).sum().backward()
    theirs = our_tensors(folder, tower.vision_config, lambda name: tensors[name].grad)
    for name, parameter in tower.named_parameters():
        # Sums over many products; relative to the largest of a tensor.
        largest = theirs[name].abs().max()
        torch.testing.assert_close(parameter.grad / largest, theirs[name] / largest, rtol=0, atol=1e-5)


def test_pixels_are_conditioned_by_the_tower(one_rank, tmp_path):
    tower, tensors = tower_of(save_radio(tmp_path, radio_tensors())), radio_tensors()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        expected = radio_in_plain_torch(tensors, (pixels / 255 - mean) / std)[:, 5:]
        torch.testing.assert_close(tower(pixels), expected, rtol=1e-4, atol=1e-4)


def test_an_earlier_layer_gives_the_features_before_the_last(one_rank, tmp_path):
    whole, tensors = save_radio(tmp_path / "whole", radio_tensors()), radio_tensors()
    one = {name: tensor for name, tensor in tensors.items() if ".blocks.1." not in name}
    shorter = save_radio(tmp_path / "shorter", one, {**SETTINGS, "num_hidden_layers": 1})
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(tower_of(whole, feature_layer=-2)(pixels), tower_of(shorter)(pixels))


def test_positions_are_resized_to_the_longer_side_and_cropped():
    positions = CroppedPositionEmbeddings(4, 0, 2, torch.float32)
    with torch.no_grad():
        positions.weight[:, 0] = torch.arange(4.0).repeat_interleave(4)  # row
        positions.weight[:, 1] = torch.arange(4.0).repeat(4)  # column
    wide = positions(2, 8).view(2, 8, 2)
    # Rows are those of the upper quarter of an 8 x 8 grid, not the whole height squeezed into two.
    steps = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0])
    torch.testing.assert_close(wide[:, 0, 0], steps[:2])
    torch.testing.assert_close(wide[0, :, 1], steps)
    assert torch.equal(positions(4, 4), positions.weight)
    assert not positions.can_resize((9, 2))


def test_half_precision_positions_are_resized_in_float32():
    positions = CroppedPositionEmbeddings(4, 0, 8, torch.bfloat16)
    table = positions.weight.float().view(1, 4, 4, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(table, size=(3, 3), mode="bilinear").bfloat16()
    assert torch.equal(positions(3, 3), expected[0].permute(1, 2, 0).reshape(9, 8))


@pytest.mark.slow
def test_tower_equals_hugging_face_radio_in_both_directions(one_rank, tmp_path):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "RadioModel"):
        pytest.skip("transformers has RadioModel from version 5 on")
    model = transformers.RadioModel(transformers.RadioConfig(**SETTINGS)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            is_scale = parameter.shape == (24,) and (parameter == 1).all()
            drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(torch.ones_like(parameter) if is_scale else drawn)
    model.save_pretrained(tmp_path / "theirs")
    tower = tower_of(tmp_path / "theirs")
    pixels = torch.rand(2, 3, 40, 3 * PATCH)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (tower.vision_config.image_mean, tower.vision_config.image_std))
    with torch.no_grad():
        expected, (summary, features) = model(pixels), tower.summarise((pixels - mean) / std)
    torch.testing.assert_close(summary, expected.summary, **FLOAT32)
    torch.testing.assert_close(features, expected.features, **FLOAT32)

    source, made = HFFolder(tmp_path / "theirs"), dict(radio.constants(tower.vision_config))
    for rule in radio.rules(tower.vision_config):
        for layer in rule.layers:
            whole = rule.transform.join([source.read(name) for name in rule.names_of(layer)])
            made.update(zip(rule.names_of(layer), rule.transform.split(whole), strict=True))
    (tmp_path / "ours").mkdir()
    save_file({name: tensor.clone() for name, tensor in made.items()}, tmp_path / "ours" / "model.safetensors")
    transformers.RadioConfig(**radio.config_to_hf(tower.vision_config)).save_pretrained(tmp_path / "ours")
    again = transformers.RadioModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        found = again(pixels)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found.summary, expected.summary)
