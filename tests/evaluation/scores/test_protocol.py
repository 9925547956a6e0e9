import importlib
import inspect

import pytest

from megatron_vlm.config.modules import module_names

PACKAGE = "megatron_vlm.evaluation.scores"


@pytest.mark.parametrize("name", module_names(PACKAGE))
def test_every_file_offers_a_score_from_0_to_1(name):
    score = importlib.import_module(f"{PACKAGE}.{name}").score
    assert list(inspect.signature(score).parameters) == ["prediction", "answers"]
    assert (score("red", ["red"]), score("green", ["red"])) == (1.0, 0.0)
