import torch

from megatron_vlm.platform.reused_memory import ReusedMemory, empty

SIZE = 4 << 20


def place_of(tensor):
    return tensor.untyped_storage().data_ptr()


def test_memory_is_used_again_once_no_tensor_uses_it():
    whole = empty((4, SIZE), torch.uint8)
    place, row = place_of(whole), whole[1].view(torch.bfloat16)
    del whole
    other = empty((4, SIZE), torch.uint8)
    assert place_of(other) != place
    row.fill_(2.0)
    assert bool((row == 2).all())
    del row
    assert place_of(empty((2 * SIZE,), torch.bfloat16)) == place


def test_a_small_tensor_does_not_hold_the_memory_of_a_large_one():
    memory = ReusedMemory()
    large = memory.take(SIZE)
    place = large.ctypes.data
    del large
    small = memory.take(SIZE // 16)
    assert small.ctypes.data != place
    assert memory.take(SIZE // 2).ctypes.data == place


def test_memory_of_smaller_tensors_is_given_back_before_more_is_taken():
    memory = ReusedMemory()
    smaller = [memory.take(1000 * number) for number in range(1, 5)]
    del smaller
    assert len(memory._free) == 4
    kept = memory.take(SIZE)
    assert not memory._free
    del kept
    assert [region.nbytes for region in memory._free.values()] == [SIZE]


def test_an_empty_tensor_has_shape_type_and_device():
    for shape in ((3, 2), (), (2048, 1024)):
        for device in (None, torch.device("meta")):
            found = empty(shape, torch.float16, device)
            assert (found.shape, found.dtype, found.is_contiguous()) == (torch.Size(shape), torch.float16, True)
            assert found.device.type == (device or torch.device("cpu")).type
