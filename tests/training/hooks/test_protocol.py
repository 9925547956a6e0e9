import importlib
import inspect

import pytest

from megatron_vlm.config.modules import module_names
from megatron_vlm.training.hook import Hook

PACKAGE = "megatron_vlm.training.hooks"
METHODS = [name for name, _ in inspect.getmembers(Hook, inspect.isfunction) if not name.startswith("_")]


@pytest.mark.parametrize("name", module_names(PACKAGE))
def test_every_file_offers_a_hook(name):
    offered = importlib.import_module(f"{PACKAGE}.{name}").Hook
    for method in METHODS:
        found = inspect.signature(getattr(offered, method))
        assert list(found.parameters) == list(inspect.signature(getattr(Hook, method)).parameters)
