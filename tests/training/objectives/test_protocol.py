import importlib
import inspect

import pytest

from megatron_vlm.config.modules import module_names
from megatron_vlm.training.objective import Objective

PACKAGE = "megatron_vlm.training.objectives"


@pytest.mark.parametrize("name", module_names(PACKAGE))
def test_every_file_offers_an_objective_that_its_settings_build(name):
    config = importlib.import_module(f"megatron_vlm.config.objectives.{name}").Config
    objective = importlib.import_module(f"{PACKAGE}.{name}").Objective(config())
    for method in ("forward", "reduce"):
        found = inspect.signature(getattr(type(objective), method))
        assert list(found.parameters) == list(inspect.signature(getattr(Objective, method)).parameters)


def test_every_objective_of_the_settings_has_its_file():
    assert module_names("megatron_vlm.config.objectives") == module_names(PACKAGE)
