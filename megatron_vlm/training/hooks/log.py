"""Writes the log line of an iteration, in Megatron-LM's form."""

import logging
from typing import Any

from megatron_vlm.training.metrics import metrics_record
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import StepMetrics

logger = logging.getLogger(__name__)


class Hook:
    """Logs on the reporting rank, every `training.log_interval` iterations and at the end."""

    def start(self, state: TrainState) -> None:
        """Nothing to prepare."""

    def step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Log the iteration if it is due; one with a validation always is."""
        due = state.iteration % state.config.training.log_interval == 0 or state.iteration == state.train_iters
        if state.is_reporter and (due or state.validation_losses):
            logger.info(log_line(metrics_record(state, metrics), state.train_iters))

    def close(self, state: TrainState) -> None:
        """Nothing to release."""


def log_line(record: dict[str, Any], train_iters: int) -> str:
    """Return the log line of a record."""
    losses = {key: value for key, value in record.items() if key.startswith(("loss/", "validation_loss"))}
    loss = "none" if record["loss"] is None else f"{record['loss']:.6E}"
    parts = [
        f"iteration {record['iteration']:8d}/{train_iters:8d}",
        f"consumed samples: {record['consumed_samples']:10d}",
        f"elapsed time per iteration (ms): {record['seconds'] * 1e3:.1f}",
        f"tokens per second: {record['tokens_per_s']:.0f}",
        f"learning rate: {record['learning_rate']:.4E}",
        f"lm loss: {loss}",
        f"grad norm: {record['grad_norm']:.3f}",
        f"padding: {record['padding']:.3f}",
        f"data wait: {record['data_wait_fraction']:.3f}",
        *(f"{key}: {value:.4f}" for key, value in losses.items()),
    ]
    return " | ".join(parts) + " |"
