import pytest
import torch
import torch.nn.functional as F

from megatron_vlm.models.layers.block_attention import attend_by_blocks

# One block, its border, several blocks, and an incomplete one.
LENGTHS = [3, 64, 1, 150, 65]


def reference(query, key, value, lengths, scale, causal):
    """Attend by torch's own function, one sample after the other."""
    outputs = []
    for parts in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        by_head = [x.transpose(0, 1) for x in parts]
        out = F.scaled_dot_product_attention(*by_head, is_causal=causal, scale=scale, enable_gqa=True)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def leaves(dtype, key_heads):
    """Return queries, keys and values that are views of one tensor, as the projection writes them."""
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(sum(LENGTHS), 4 + 2 * key_heads, 8, generator=generator, dtype=dtype).requires_grad_()
    return whole, whole.split([4, key_heads, key_heads], dim=1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_output_and_gradients_are_those_of_torch(key_heads, causal):
    results = []
    for attend in (attend_by_blocks, reference):
        whole, (query, key, value) = leaves(torch.float64, key_heads)
        out = attend(query, key, value, LENGTHS, scale=0.3, causal=causal)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        (out * weights).sum().backward()
        results.append((out, whole.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_float32_is_as_exact_as_torch():
    single = leaves(torch.float32, 2)[1]
    exact = reference(*(x.double() for x in single), LENGTHS, 0.3, True)
    ours = attend_by_blocks(*single, LENGTHS, scale=0.3, causal=True)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=2e-6)  # sums of up to 150 terms in float32


def test_no_score_of_another_sample_is_computed():
    _, (query, key, value) = leaves(torch.float32, 4)
    together = attend_by_blocks(query, key, value, LENGTHS, scale=0.3, causal=False)
    start = LENGTHS[0]
    alone = [x[start : start + LENGTHS[1]] for x in (query, key, value)]
    assert torch.equal(
        together[start : start + LENGTHS[1]], attend_by_blocks(*alone, LENGTHS[1:2], scale=0.3, causal=False)
    )
