import pytest

from megatron_vlm.platform.fake_device import device
from tests.platform.fake_device import programs


def test_modules_are_converted_with_marks_and_shared_weights(fake_process):
    where, dtype, is_shared, mark, learns, buffer_is_at, type_name = fake_process.run(programs.convert_modules)
    assert (where, buffer_is_at) == ("cuda:0", "cuda:0")
    assert (dtype, type_name) == ("torch.bfloat16", "torch.cuda.BFloat16Tensor")
    assert is_shared
    assert learns
    assert mark == "kept"


def test_install_refuses_a_process_with_megatron_core():
    import megatron.core.tensor_parallel.random  # noqa: F401

    with pytest.raises(RuntimeError, match="before megatron.core is imported"):
        device.install()
