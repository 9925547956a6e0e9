"""Calibration texts, and exports of a tiny model that was given inputs with outliers, as large models have them."""

from pathlib import Path

import pytest

from megatron_vlm.config import ModelConfig
from tests.support.configs import tiny_model
from tests.support.sentence_piece import NUM_PIECES

WORDS = (
    "the circle is red and a small blue square stands on the left side of the picture with 3 dogs ; yes or no ?".split()
)


@pytest.fixture(scope="session")
def model_config() -> ModelConfig:
    return tiny_model(vocab_size=NUM_PIECES, num_layers=2)


@pytest.fixture(scope="session")
def calibration(tmp_path_factory) -> Path:
    """A text of about 4,000 tokens."""
    path = tmp_path_factory.mktemp("calibration") / "text.txt"
    path.write_text(" ".join(WORDS[(7 * number + number**2 // 11) % len(WORDS)] for number in range(1600)))
    return path
