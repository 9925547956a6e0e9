import torch

from megatron_vlm.models.layers.layer_scale import LayerScale


def test_output_and_bias_are_scaled_and_the_residual_is_not():
    scale = LayerScale(8, 0.1, torch.float32)
    assert torch.equal(scale.weight, torch.full((8,), 0.1))
    torch.nn.init.normal_(scale.weight)
    output, bias, residual = torch.randn(5, 2, 8), torch.randn(8), torch.randn(5, 2, 8)
    add = scale(True, False)
    torch.testing.assert_close(add((output, bias), residual, 0.0), residual + scale.weight * (output + bias))
    torch.testing.assert_close(add((output, None), residual, 0.0), residual + scale.weight * output)
