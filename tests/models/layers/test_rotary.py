from functools import partial

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.models.layers.rotary import positions_in_samples, rotary_table, rotate

LENGTHS = [3, 7, 1, 5]
CHANNELS = 8
INV_FREQ = 1.0 / 10_000 ** (torch.arange(0, CHANNELS, 2).float() / CHANNELS)
CONFIG = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4)


def borders(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def qkv_product(dtype, *, key_heads):
    """Return float[t, 1, key_heads, (queries a group + 2) * d], as the QKV projection makes it."""
    generator = torch.Generator().manual_seed(0)
    shape = (sum(LENGTHS), 1, key_heads, (4 // key_heads + 2) * CHANNELS)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def split(product):
    """Return queries, keys and values as megatron-core's SelfAttention does."""
    query, key, value = product.split([product.size(-1) - 2 * CHANNELS, CHANNELS, CHANNELS], dim=-1)
    return query.reshape(query.size(0), 1, -1, CHANNELS), key, value


def megatron_rotate(query, key, cp_group):
    table = torch.outer(torch.arange(64.0), INV_FREQ)
    table = torch.cat((table, table), -1)[:, None, None]
    rotated = partial(apply_rotary_pos_emb, config=CONFIG, cu_seqlens=borders(LENGTHS), cp_group=cp_group)
    return [rotated(x.squeeze(1), table).unsqueeze(1) for x in (query, key)]


def our_rotate(query, key):
    positions = positions_in_samples(sum(LENGTHS), borders(LENGTHS))
    return rotate(query, key, rotary_table(positions, INV_FREQ, query.dtype))


def test_positions_restart_at_each_sample():
    positions = positions_in_samples(11, borders([3, 1, 4]))
    assert positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 0, 1, 2]  # the last three lie behind the last sample
    assert positions.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_rotation_and_its_gradient_equal_megatron_cores_to_the_bit(one_rank, dtype, key_heads):
    cp_group = torch.distributed.group.WORLD
    results = []
    for rotation in (partial(megatron_rotate, cp_group=cp_group), our_rotate):
        product = qkv_product(dtype, key_heads=key_heads)
        query, key, value = split(product * 1)  # the projection's output is no leaf
        query, key = rotation(query, key)
        weights = [torch.arange(x.numel(), dtype=dtype).view(x.shape) % 7 for x in (query, key, value)]
        sum((x * w).sum() for x, w in zip((query, key, value), weights, strict=True)).backward()
        results.append([query.detach(), key.detach(), value.detach(), product.grad])
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(theirs, ours)


def test_queries_and_keys_stay_in_the_memory_of_the_product():
    product = qkv_product(torch.float32, key_heads=4).detach()
    query, key, _ = split(product)
    rotated = our_rotate(query, key)
    assert [x.data_ptr() for x in rotated] == [query.data_ptr(), key.data_ptr()]


def test_rotation_needs_the_distance_of_two_tokens_alone():
    query, key = (torch.randn(1, 1, 1, CHANNELS).expand(20, 1, 1, CHANNELS).clone() for _ in range(2))
    table = rotary_table(torch.arange(20, dtype=torch.int32), INV_FREQ, torch.float32)
    query, key = (x.view(20, CHANNELS) for x in rotate(query, key, table))
    scores = query @ key.T
    # float32 sums of 8 products
    torch.testing.assert_close(scores[3:13, 5], scores[7:17, 9], rtol=1e-5, atol=1e-5)
