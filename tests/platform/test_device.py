import pytest
import torch

from megatron_vlm.platform.device import set_deterministic


@pytest.fixture
def restored():
    """Leave torch as other tests expect it."""
    yield
    set_deterministic(False)
    torch.backends.cudnn.benchmark = False


def test_deterministic_mode_is_set_and_taken_back(restored):
    torch.backends.cudnn.benchmark = True
    set_deterministic(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
