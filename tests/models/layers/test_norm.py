import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.models.layers.norm import Norm


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
