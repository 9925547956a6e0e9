import torch

from megatron_vlm.platform.reused_tensors import empty

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


def test_an_empty_tensor_has_shape_type_and_device():
    for shape in ((3, 2), (), (2048, 1024)):
        for device in (None, torch.device("meta")):
            found = empty(shape, torch.float16, device)
            assert (found.shape, found.dtype, found.is_contiguous()) == (torch.Size(shape), torch.float16, True)
            assert found.device.type == (device or torch.device("cpu")).type
