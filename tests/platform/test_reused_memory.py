import numpy as np
import pytest

from megatron_vlm.platform.reused_memory import ReusedMemory

SIZE = 4 << 20


@pytest.mark.parametrize(
    "view",
    [lambda a: a[5:], lambda a: a[5:][:9][::2], lambda a: a.view(np.int32)[1:].reshape(1, -1), lambda a: a[1:].data],
    ids=["part", "part of a part", "other shape", "buffer"],
)
def test_memory_is_used_again_only_once_no_view_uses_it(view):
    memory = ReusedMemory()
    whole = memory.take(SIZE)
    place, part = whole.ctypes.data, view(whole)
    del whole
    other = memory.take(SIZE)
    assert other.ctypes.data != place
    del part
    assert memory.take(SIZE).ctypes.data == place


def test_a_small_array_does_not_hold_the_memory_of_a_large_one():
    memory = ReusedMemory()
    large = memory.take(SIZE)
    place = large.ctypes.data
    del large
    small = memory.take(SIZE // 16)
    assert small.ctypes.data != place
    assert memory.take(SIZE // 2).ctypes.data == place


def test_memory_of_smaller_arrays_is_given_back_before_more_is_taken():
    memory = ReusedMemory()
    smaller = [memory.take(1000 * number) for number in range(1, 5)]
    del smaller
    assert len(memory._free) == 4
    kept = memory.take(SIZE)
    assert not memory._free
    del kept
    assert list(map(len, memory._free.values())) == [SIZE]
