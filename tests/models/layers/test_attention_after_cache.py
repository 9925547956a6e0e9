import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.models.layers.attention import PackedAttention


def test_queries_after_a_cache_attend_as_in_the_whole_sequence():
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0
    )
    attention = PackedAttention(config, 1, AttnMaskType.causal, "self")
    query, key, value = (torch.randn(9, 3, heads, 8) for heads in (4, 2, 2))
    whole = attention(query, key, value, None)
    for cached in (0, 3, 8):
        assert torch.allclose(attention(query[cached:], key, value, None), whole[cached:], atol=1e-6)
