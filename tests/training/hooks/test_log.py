import logging

import pytest

from megatron_vlm.training.hooks.log import Hook, log_line
from tests.support.states import METRICS, make_state

RECORD = {
    "iteration": 3,
    "consumed_samples": 12,
    "seconds": 0.5,
    "tokens_per_s": 4000.0,
    "learning_rate": 1e-3,
    "loss": 2.5,
    "grad_norm": 1.25,
    "padding": 0.05,
    "data_wait_fraction": 0.25,
    "loss/coyo": 2.0,
    "validation_loss": 3.0,
    "validation_loss/coyo": 3.5,
}


def test_log_line_is_in_megatrons_form_and_names_each_dataset():
    line = log_line(RECORD, 10)
    assert line.startswith("iteration        3/      10 | consumed samples:         12 | ")
    assert "lm loss: 2.500000E+00 |" in line
    assert "padding: 0.050 | data wait: 0.250 |" in line
    assert line.endswith("loss/coyo: 2.0000 | validation_loss: 3.0000 | validation_loss/coyo: 3.5000 |")


@pytest.mark.parametrize(
    ("iteration", "changes", "is_logged"),
    [
        (4, {}, True),
        (5, {}, False),
        (10, {}, True),  # the last one
        (5, {"validation_losses": {"validation_loss": 1.0}}, True),
        (4, {"is_reporter": False}, False),
    ],
)
def test_lines_come_at_the_interval_at_the_end_and_with_a_validation(caplog, iteration, changes, is_logged):
    with caplog.at_level(logging.INFO):
        Hook().step(make_state(iteration=iteration, training={"log_interval": 4}, **changes), METRICS)
    assert ("lm loss" in caplog.text) == is_logged


def test_a_step_without_labels_has_no_loss_in_its_line():
    assert "lm loss: none |" in log_line({**RECORD, "loss": None}, 10)
