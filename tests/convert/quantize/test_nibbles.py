import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.convert.quantize.nibbles import pack_nibbles, unpack_nibbles


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.tuples(*8 * [st.integers(0, 15)]), min_size=1, max_size=5).map(lambda rows: [*sum(rows, ())]))
def test_what_is_packed_is_unpacked(dtype, values):
    tensor = torch.tensor(values, dtype=torch.uint8)
    packed = pack_nibbles(tensor, dtype)
    assert packed.numel() * 2 * dtype.itemsize == len(values)
    assert torch.equal(unpack_nibbles(packed), tensor)


def test_the_first_value_is_in_the_lowest_bits():
    assert pack_nibbles(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), torch.int16).tolist() == [0x4321]
