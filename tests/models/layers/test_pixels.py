import torch

from megatron_vlm.models.layers.pixels import PixelNormaliser

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def test_uint8_pixels_are_normalised_by_colour():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)
    expected = torch.stack([torch.tensor([-m / s, (1 - m) / s]) for m, s in zip(MEAN, STD, strict=True)])
    torch.testing.assert_close(PixelNormaliser(MEAN, STD)(pixels), expected.view(1, 3, 1, 2))


def test_float_pixels_are_left_as_they_are():
    pixels = torch.randn(1, 3, 2, 2)
    assert PixelNormaliser(MEAN, STD)(pixels) is pixels
