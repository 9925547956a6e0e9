import math

import pytest
import torch
import torch.nn.attention.varlen
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.models.layers.attention import PackedAttention, _kernel


def attention(mask=AttnMaskType.causal, **settings):
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, attention_dropout=0.0, **settings)
    return PackedAttention(config, 1, mask, "self")


def packed(lengths):
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def qkv(length, key_heads=4):
    generator = torch.Generator().manual_seed(0)
    heads = (4, key_heads, key_heads)
    return [torch.randn(length, n, 8, generator=generator) for n in heads]


@pytest.mark.parametrize("key_heads", [4, 2])
def test_packed_samples_equal_each_alone(key_heads):
    core, lengths = attention(), [3, 7, 1, 5]
    q, k, v = qkv(sum(lengths), key_heads)
    together = core(q, k, v, None, packed_seq_params=packed(lengths))
    start = 0
    for length in lengths:
        part = [x[start : start + length].unsqueeze(1) for x in (q, k, v)]
        # the same products; the kernel sums them in blocks of another size
        torch.testing.assert_close(together[start : start + length], core(*part, None).squeeze(1), rtol=1e-5, atol=1e-6)
        start += length


def test_a_later_token_does_not_change_an_earlier_one():
    core = attention()
    q, k, v = qkv(6)
    before = core(q, k, v, None, packed_seq_params=packed([6]))
    k[5], v[5] = 1.0, 1.0
    after = core(q, k, v, None, packed_seq_params=packed([6]))
    assert torch.equal(before[:5], after[:5])
    assert not torch.equal(before[5], after[5])


def test_one_query_against_cached_keys_sees_all_of_them():
    core = attention()
    q, k, v = (x.unsqueeze(1) for x in qkv(6))
    whole = core(q, k, v, None)
    torch.testing.assert_close(core(q[5:], k, v, None), whole[5:], rtol=1e-5, atol=1e-6)


def test_masks_are_refused():
    q, k, v = qkv(2)
    with pytest.raises(ValueError, match="not masks or biases"):
        attention()(q, k, v, torch.ones(1, 1, 2, 2))


def test_borders_that_do_not_cover_the_tokens_are_refused():
    q, k, v = qkv(5)
    with pytest.raises(ValueError, match="sample boundaries cover 4 of 5 tokens"):
        attention()(q, k, v, None, packed_seq_params=packed([4]))


def test_attention_dropout_is_refused():
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, attention_dropout=0.1)
    with pytest.raises(ValueError, match="no attention dropout"):
        PackedAttention(config, 1, AttnMaskType.causal, "self")


def test_context_parallelism_needs_causal_attention():
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, attention_dropout=0.0, context_parallel_size=2
    )
    with pytest.raises(ValueError, match="context parallelism needs causal attention"):
        PackedAttention(config, 1, AttnMaskType.no_mask, "self")


@pytest.mark.parametrize("cached", [0, 3, 8])
def test_queries_after_a_cache_attend_as_in_the_whole_sequence(cached):
    core = attention(num_query_groups=2)
    query, key, value = (torch.randn(9, 3, heads, 8) for heads in (4, 2, 2))
    torch.testing.assert_close(
        core(query[cached:], key, value, None), core(query, key, value, None)[cached:], rtol=1e-5, atol=1e-6
    )


class OnDevice(torch.Tensor):
    """A tensor of the host that says it is on a GPU."""

    is_cuda = property(lambda self: True)


def attend_each(query, key, value, cu_seq_q, *, scale, causal):
    """What torch's kernel computes; like the kernel, it needs as many heads everywhere."""
    assert query.size(1) == key.size(1) == value.size(1)
    spans = zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True)
    outputs = []
    for start, end in spans:
        sample = [x[start:end].transpose(0, 1) for x in (query, key, value)]
        out = torch.nn.functional.scaled_dot_product_attention(*sample, scale=scale, is_causal=causal)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def kernel_of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    return attend_each(query, key, value, cu_seq_q, scale=None, causal=is_causal)


def kernel_of_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return attend_each(query, key, value, cu_seq_q, scale=scale, causal=window_size == (-1, 0))


def kernel_of_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    num_splits=None,
):
    assert enable_gqa
    key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
    return attend_each(query, key, value, cu_seq_q, scale=scale, causal=window_size == (-1, 0))


@pytest.fixture
def use_kernel(monkeypatch):
    """Put a kernel in the place of torch's."""

    def use(kernel):
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
        _kernel.cache_clear()

    yield use
    _kernel.cache_clear()


@pytest.mark.parametrize("kernel", [kernel_of_2_10, kernel_of_2_12, kernel_of_2_13])
@pytest.mark.parametrize("mask", [AttnMaskType.causal, AttnMaskType.no_mask])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_kernel_of_every_torch_computes_what_the_host_computes(use_kernel, kernel, mask, scale):
    use_kernel(kernel)
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, attention_dropout=0.0)
    core = PackedAttention(config, 1, mask, "self", softmax_scale=scale)
    lengths = [3, 7, 1, 5]
    q, k, v = (x.bfloat16() for x in qkv(sum(lengths), key_heads=2))
    on_device = core(*(x.as_subclass(OnDevice) for x in (q, k, v)), None, packed_seq_params=packed(lengths))
    on_host = core(q, k, v, None, packed_seq_params=packed(lengths))
    # bf16 has 8 bits; without `scale` the query is scaled, and rounded, before the product.
    torch.testing.assert_close(on_device.as_subclass(torch.Tensor), on_host, rtol=2e-2, atol=2e-2)


def test_float32_never_reaches_the_kernel_which_takes_half_precision_only(use_kernel):
    def refuse(*args, **kwargs):
        raise RuntimeError("FlashAttention only supports fp16 and bf16")

    use_kernel(refuse)
    q, k, v = qkv(5)
    core = attention()
    on_device = core(*(x.as_subclass(OnDevice) for x in (q, k, v)), None, packed_seq_params=packed([2, 3]))
    assert torch.equal(on_device.as_subclass(torch.Tensor), core(q, k, v, None, packed_seq_params=packed([2, 3])))
    with pytest.raises(RuntimeError, match="only supports fp16"):
        core(*(x.bfloat16().as_subclass(OnDevice) for x in (q, k, v)), None, packed_seq_params=packed([2, 3]))


def test_installed_kernel_takes_the_arguments_that_it_is_given():
    _, accepted = _kernel()
    assert {"scale", "window_size"} <= accepted or "is_causal" in accepted
    assert math.isclose(attention().softmax_scale, 8**-0.5)  # the default of the kernel
