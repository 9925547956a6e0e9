import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.models.layers.norm import Norm, NormOfAllHeads


def config_of(normalization="LayerNorm", **settings):
    return TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, normalization=normalization, **settings
    )


def test_layer_norm_takes_away_the_mean_and_rms_norm_does_not():
    x = torch.randn(5, 32) + 3
    centred = x - x.mean(-1, keepdim=True)
    by_size = x / x.square().mean(-1, keepdim=True).add(1e-3).sqrt()
    layer, rms = (Norm(config_of(kind), 32, eps=1e-3) for kind in ("LayerNorm", "RMSNorm"))
    torch.testing.assert_close(layer(x), centred / centred.square().mean(-1, keepdim=True).add(1e-3).sqrt())
    torch.testing.assert_close(rms(x), by_size)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_weights_are_marked_for_the_sum_over_ranks_that_see_other_tokens(sequence_parallel):
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel}
    for parameter in Norm(config_of(**layout), 32).parameters():
        assert parameter.sequence_parallel == sequence_parallel


@pytest.mark.parametrize("setting", ["layernorm_zero_centered_gamma", "memory_efficient_layer_norm"])
def test_norm_of_another_library_is_refused(setting):
    with pytest.raises(ValueError, match="transformer_engine backend"):
        Norm(config_of(**{setting: True}), 32)


@pytest.mark.parametrize("shape", [(6, 32), (3, 2, 32)])
def test_rms_norm_and_its_gradients_are_those_of_torch(shape):
    ours = Norm(config_of("RMSNorm", params_dtype=torch.float64), 32, eps=1e-3)
    theirs = torch.nn.RMSNorm(32, eps=1e-3, dtype=torch.float64)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    results = []
    for norm in (ours, theirs):
        out = norm(x)
        weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(shape)
        results.append((out, *torch.autograd.grad((out * weights).sum(), (x, norm.weight))))
    torch.testing.assert_close(results[0], results[1])


def test_a_frozen_rms_norm_passes_the_gradient_on():
    norm = Norm(config_of("RMSNorm"), 32).requires_grad_(False)
    x = torch.randn(5, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(norm(x).square().sum(), x)
    (expected,) = torch.autograd.grad(torch.nn.functional.rms_norm(x, (32,), norm.weight, 1e-5).square().sum(), x)
    torch.testing.assert_close(grad, expected)


def test_the_norm_of_all_heads_takes_them_as_one_row():
    norm = NormOfAllHeads(config_of(), 8, 1e-3)  # 4 heads of 8 channels
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 2, 4, 3 * 8)[..., :8]  # a part of the product of the QKV projection
    expected = torch.nn.functional.rms_norm(x.flatten(-2), (32,), norm.weight, 1e-3)
    torch.testing.assert_close(norm(x), expected.view(5, 2, 4, 8))
