import importlib.util

import pytest
import torch

from megatron_vlm.config import ConfigError
from megatron_vlm.models.layers.specs import choose_backend, needs_packed_attention


@pytest.fixture
def machine(monkeypatch):
    """Say what there is: `machine(gpu=True, library=False)`."""
    find_spec = importlib.util.find_spec

    def set_machine(*, gpu, library, capability=(9, 0), flash_attn=True):
        there = {"transformer_engine": library, "flash_attn": flash_attn}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: (object() if there[name] else None) if name in there else find_spec(name),
        )

    return set_machine


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("library", [True, False])
def test_auto_takes_transformer_engine_only_with_a_gpu_and_the_library(machine, gpu, library):
    machine(gpu=gpu, library=library)
    assert choose_backend("auto") == ("transformer_engine" if gpu and library else "torch")
    assert choose_backend("torch") == "torch"


@pytest.mark.parametrize(("gpu", "library"), [(False, True), (True, False), (False, False)])
def test_transformer_engine_that_is_not_usable_is_refused(machine, gpu, library):
    machine(gpu=gpu, library=library)
    with pytest.raises(ConfigError, match=r"model.backend=transformer_engine, but .*; fix: set model.backend=auto"):
        choose_backend("transformer_engine")


def test_transformer_engine_is_taken_where_it_is_usable(machine):
    machine(gpu=True, library=True)
    assert choose_backend("transformer_engine") == "transformer_engine"


@pytest.mark.parametrize(
    ("capability", "flash_attn", "needed"),
    [
        ((8, 0), False, True),
        ((8, 9), False, True),
        ((8, 0), True, False),
        ((9, 0), False, False),
        ((10, 0), True, False),
    ],
)
def test_torch_attends_only_where_transformer_engine_has_no_kernel_for_packed_samples(
    machine, capability, flash_attn, needed
):
    machine(gpu=True, library=True, capability=capability, flash_attn=flash_attn)
    assert needs_packed_attention() == needed
