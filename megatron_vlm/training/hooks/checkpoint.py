"""Saves checkpoints at their interval and before the run ends."""

import logging

from megatron_vlm.checkpoint.save import save_checkpoint
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import StepMetrics

logger = logging.getLogger(__name__)


class Hook:
    """Saves on all ranks together; comes after the hooks that set `state.stop_reason`, to save an early end."""

    def start(self, state: TrainState) -> None:
        """Nothing to prepare."""

    def step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Save a checkpoint if one is due."""
        due = state.iteration % state.config.checkpoint.save_interval == 0
        if due or state.stop_reason is not None or state.iteration == state.train_iters:
            state.gather_parameters()
            path = save_checkpoint(state.config, state.chunks, state.optimizer, state.progress(), state.base)
            if state.is_reporter:
                logger.info("saved checkpoint %s", path)

    def close(self, state: TrainState) -> None:
        """Nothing to release: after an error, the last checkpoint is the newest valid state."""
