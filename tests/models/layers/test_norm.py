from types import SimpleNamespace

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
    alone = SimpleNamespace(size=lambda: 1)
    norm = NormOfAllHeads(config_of(), 8, 1e-3, alone)  # 4 heads of 8 channels
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 2, 4, 3 * 8)[..., :8]  # a part of the product of the QKV projection
    expected = torch.nn.functional.rms_norm(x.flatten(-2), (32,), norm.weight, 1e-3)
    torch.testing.assert_close(norm(x), expected.view(5, 2, 4, 8))


def norm_of_split_heads(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return output and gradients of this rank's heads, each beside torch's of all heads together."""
    group, rank, size = torch.distributed.group.WORLD, torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    norm = NormOfAllHeads(config_of(params_dtype=dtype), 8, 1e-3, group)
    weight, x, direction = (torch.randn(shape, dtype=dtype) for shape in ((32,), (5, 2, 4, 8), (5, 2, 4, 8)))
    weight, x = weight.requires_grad_(), x.requires_grad_()
    heads = slice(rank * 4 // size, (rank + 1) * 4 // size)
    mine = x.detach()[:, :, heads].clone().requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(weight.view(4, 8)[heads].flatten())
    out = norm(mine)
    grads = torch.autograd.grad(out, (mine, norm.weight), direction[:, :, heads])
    whole = torch.nn.functional.rms_norm(x.flatten(-2), (32,), weight, 1e-3).view(x.shape)
    expected = torch.autograd.grad(whole, (x, weight), direction)
    return {
        "output": torch.stack([out, whole[:, :, heads]]).detach(),
        "gradient": torch.stack([grads[0], expected[0][:, :, heads]]),
        "weight": torch.stack([grads[1], expected[1].view(4, 8)[heads].flatten()]),
    }


@pytest.mark.distributed
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_norm_of_heads_on_several_ranks_is_that_of_all(workers, dtype, tolerance):
    for found in workers.run("tests.models.layers.test_norm:norm_of_split_heads", 2, dtype=dtype):
        for name, (ours, theirs) in found.items():
            assert ours.dtype == dtype
            # A number of bf16 has 8 bits, and torch rounds sums of gradients more than once.
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)
