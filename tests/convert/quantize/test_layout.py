import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.config import UsageError
from megatron_vlm.config.modules import module_names
from megatron_vlm.convert.quantize.groups import Grid, Quantised
from megatron_vlm.convert.quantize.layout import LAYOUTS, Layout, find_layout

NAMES = module_names(LAYOUTS)


def layout_of(name: str) -> Layout:
    method = "compressed-tensors" if name == "compressed_tensors" else "awq"
    return find_layout(method, name)


def draw(layout: Layout, outputs: int, inputs: int, group_size: int, seed: int) -> Quantised:
    generator = torch.Generator().manual_seed(seed)
    shape = (outputs, inputs // group_size)
    values = torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    scales = (torch.rand(shape, generator=generator) + 1e-3).to(layout.DTYPE or torch.bfloat16)
    return Quantised(values, scales, torch.full_like(zeros, 8) if layout.GRID.is_symmetric else zeros)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(
    outputs=st.integers(1, 6).map(lambda count: 8 * count),
    groups=st.integers(1, 20),
    group_size=st.sampled_from([64, 128]),
    seed=st.integers(0, 2**32),
)
def test_what_is_packed_is_unpacked_to_the_bit(name, outputs, groups, group_size, seed):
    layout = layout_of(name)
    weight = draw(layout, outputs, groups * group_size, group_size, seed)
    found = layout.unpack(layout.pack(weight), group_size)
    for field in ("values", "scales", "zeros"):
        assert torch.equal(getattr(found, field), getattr(weight, field)), field


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_known_without_values(name):
    layout = layout_of(name)
    weight = draw(layout, 16, 384, 64, 0)
    without = layout.pack(Quantised(*(tensor.to("meta") for tensor in (weight.values, weight.scales, weight.zeros))))
    packed = layout.pack(weight)
    assert {key: (one.shape, one.dtype) for key, one in without.items()} == {
        key: (one.shape, one.dtype) for key, one in packed.items()
    }


def test_gemm_holds_eight_columns_in_an_integer_in_the_order_of_its_kernel():
    values = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 8)
    weight = Quantised(values, torch.ones(8, 1).half(), values[:, :1])
    packed = layout_of("gemm").pack(weight)
    assert packed["qweight"].shape == (8, 1)
    # The lowest nibble first: columns 0, 2, 4, 6, 1, 3, 5, 7.
    assert {int(word) for word in packed["qweight"].flatten()} == {0x75316420}
    assert packed["qzeros"].tolist() == [[0x75316420]]


def test_tinychat_interleaves_four_rows_and_the_inputs_of_a_run():
    rows = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)[:, None].expand(4, 64)
    ones = torch.ones(4, 1).half()
    packed = layout_of("tinychat").pack(Quantised(rows, ones, torch.full((4, 1), 3, dtype=torch.uint8)))
    assert packed["qweight"].shape == (1, 64)
    assert packed["qweight"].flatten().tolist() == [0x1111] * 16 + [0x2222] * 16 + [0x3333] * 16 + [0x4444] * 16
    assert packed["scaled_zeros"][0].tolist() == [-3.0] * 4
    assert packed["scales"].shape == (16, 4)  # groups of 64: rows up to a multiple of 16
    values = torch.zeros(4, 64, dtype=torch.uint8)
    values[0, [0, 8, 16, 24]] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    assert layout_of("tinychat").pack(Quantised(values, ones, ones.byte()))["qweight"][0, 0] == 0x4321


def test_compressed_tensors_holds_eight_neighbours_in_an_integer():
    values = torch.arange(16, dtype=torch.uint8)[None]
    packed = layout_of("compressed_tensors").pack(Quantised(values, torch.ones(1, 1), torch.full((1, 1), 8).byte()))
    assert [word & 0xFFFFFFFF for word in packed["weight_packed"][0].tolist()] == [0x76543210, 0xFEDCBA98]
    assert packed["weight_shape"].tolist() == [1, 16]


def test_a_method_has_a_layout_of_its_own_and_lists_the_others():
    assert find_layout("awq", None) is layout_of("gemm")
    assert find_layout("compressed-tensors", None).GRID == Grid(is_symmetric=True)
    with pytest.raises(UsageError, match="unknown method of quantisation 'gptq'; fix: choose one of awq, compressed-t"):
        find_layout("gptq", None)
    with pytest.raises(UsageError, match="awq has no layout 'gemv'; fix: choose one of gemm, tinychat"):
        find_layout("awq", "gemv")
    with pytest.raises(UsageError, match="compressed-tensors has no layout 'gemm'"):
        find_layout("compressed-tensors", "gemm")
